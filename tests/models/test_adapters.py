"""Adapters: merged as peft merges them, from every place they lie in, and refused where another formula holds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder
from transformers import AutoModelForCausalLM

from upslope.build import load_inference, load_policy
from upslope.errors import ConfigError, ModelError
from upslope.manifest import write_manifest
from upslope.models.attention.context import PackedContext
from upslope.models.files.adapters import WEIGHTS, adapter_config, base_source, merge_adapters
from upslope.models.files.loading import load_model
from upslope.models.files.sources import resolve
from upslope.options import SFTOptions

TOKENS = torch.arange(5, 65)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "m")


def make_adapter(base: Path, folder: Path, *, std: float = 0.3, **changes: Any) -> dict[str, torch.Tensor]:
    """A PEFT folder with random adapters, written by peft; the weights as peft itself merges them."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


def merged(base: Path, folder: Path) -> torch.nn.Module:
    model = load_model(base)
    merge_adapters(model, folder)
    return model


def test_by_hand() -> None:
    """W = 1, B = 2, A = 3, alpha = 8, r = 2: 1 + 8/2 (2*3 + 5*1) = 45; rank-stabilised 1 + 8/sqrt(2) 11."""
    for changes, expected in (({}, 45.0), ({"use_rslora": True}, 1 + 8 / math.sqrt(2) * 11)):
        assert _one_by_one(**changes) == pytest.approx(expected, rel=1e-6)


def _one_by_one(**config: Any) -> float:
    import tempfile

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1, bias=False)})
    model["a"].weight.data.fill_(1.0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config})
        )
        pair = {"lora_A": torch.tensor([[3.0], [1.0]]), "lora_B": torch.tensor([[2.0, 5.0]])}
        save_file({f"base_model.model.a.{k}.weight": x for k, x in pair.items()}, folder / WEIGHTS)
        merge_adapters(model, folder)
    return float(model["a"].weight.detach())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["norm"]},
    ],
    ids=str,
)
def test_as_peft_merges(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = make_adapter(base, tmp_path / "a", **changes)
    start = dict(load_model(base).named_parameters())
    ours = dict(merged(base, tmp_path / "a").named_parameters())
    changed = 0
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.detach(), theirs[name], rtol=1e-6, atol=1e-6, msg=name)
        changed += not torch.equal(parameter, start[name])
    assert changed >= 6


def test_an_embedding_trained_apart_from_its_output_layer_is_no_merge(base: Path, tmp_path: Path) -> None:
    """peft leaves the head at the base's weights then, and one shared matrix cannot be both."""
    model = load_model(base)
    assert model.output_weight is dict(model.named_parameters())["model.embed_tokens.weight"]
    make_adapter(base, tmp_path / "a", modules_to_save=["embed_tokens"])
    with pytest.raises(ModelError, match=r"holds model.embed_tokens.weight apart from the output layer"):
        merged(base, tmp_path / "a")


def test_joined_projections_stay_joined(base: Path, tmp_path: Path) -> None:
    """The merged decoder computes q, k and v as one product, and the product sees the merged weights."""
    theirs = make_adapter(base, tmp_path / "a")
    model = merged(base, tmp_path / "a")
    attention = model.model.layers[0].self_attn
    end = attention.q_proj.weight.data_ptr() + attention.q_proj.weight.numel() * 4
    assert attention.k_proj.weight.data_ptr() == end
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_state_dict(theirs)
    with torch.no_grad():
        ours = model.logits(model(TOKENS, PackedContext([len(TOKENS)])))
        torch.testing.assert_close(ours, plain(TOKENS[None]).logits[0], rtol=1e-4, atol=1e-4)


def adapted_run(base: str, run: Path, launched_in: Path) -> Path:
    """What a run with lora_rank leaves: config.toml, env.json, one checkpoint that `best` and `last` name."""
    options = SFTOptions(model=base, data="unused", lora_rank=4, dtype="float32")
    policy = load_policy(options)
    trained = {n: p.detach() for n, p in policy.model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.normal_(std=0.2)
    folder = run / "checkpoints" / "step-00000002" / "model"
    policy.write(folder, trained)
    write_manifest(folder.parent, step=2, serial=1, best=True)
    for name in ("best", "last"):
        os.symlink("step-00000002", run / "checkpoints" / name)
    (run / "config.toml").write_text(f'model = "{base}"\nlora_rank = 4\n')
    (run / "env.json").write_text(json.dumps({"folder": str(launched_in)}))
    with torch.no_grad():
        logits = policy.model.logits(policy.model(TOKENS, PackedContext([len(TOKENS)])))
    torch.save(logits, run / "logits.pt")
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    adapted_run(str(base), tmp_path / "run", tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/best", "checkpoints/step-00000002", "model"])
def test_a_run_is_its_adapted_model(run: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded from any place in the run, log-probs are those of the model that was trained."""
    source = run / ("checkpoints/last/model" if place == "model" else place)
    policy = load_inference(source, dtype="float32")
    with torch.no_grad():
        ours = policy.model.logits(policy.model(TOKENS, PackedContext([len(TOKENS)])))
    trained = torch.load(run / "logits.pt")
    torch.testing.assert_close(ours.log_softmax(-1), trained.log_softmax(-1), rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert "merging the adapters of" in said
    assert ("using its best checkpoint, step-00000002" in said) == (place in ("", "checkpoints"))
    assert policy.eos_token_ids == (1,)
    assert not any(p.requires_grad for p in policy.model.parameters())


def test_bfloat16_rounds_the_merged_weight_once(run: Path) -> None:
    whole, rounded = (load_inference(run, dtype=dtype).model for dtype in ("float32", "bfloat16"))
    for (name, x), (_, y) in zip(whole.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(x.bfloat16(), y), name


def test_a_relative_base_starts_where_the_run_did(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    folder = adapted_run("m", tmp_path / "run", base.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_source(folder) == str(base)
    assert load_inference(tmp_path / "run", dtype="float32").folder == base


def test_the_base_is_an_option_and_the_folders_own_word_comes_before_the_runs(
    base: Path, tmp_path: Path, run: Path
) -> None:
    make_adapter(base, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    named = json.loads(config.read_text())
    assert base_source(tmp_path / "a") == str(base)
    config.write_text(json.dumps({**named, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="which model they belong to with --base"):
        load_inference(tmp_path / "a")
    assert load_inference(tmp_path / "a", dtype="float32", base=str(base)).folder == base
    with pytest.raises(ConfigError, match="--base is for adapters"):
        load_inference(base, base=str(base))


def test_a_tokenizer_beside_the_adapters_wins(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "a")
    tokenizer = load_inference(base).tokenizer
    tokenizer.chat_template = "other"
    tokenizer.save_pretrained(tmp_path / "a")
    assert load_inference(tmp_path / "a").tokenizer.chat_template == "other"


def test_training_from_adapters_starts_at_the_merged_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))
    policy = load_policy(SFTOptions(model=str(run), data="unused", dtype="float32"))
    assert policy.folder == resolve(run)
    with torch.no_grad():
        ours = policy.model.logits(policy.model(TOKENS, PackedContext([len(TOKENS)])))
    trained = torch.load(run / "logits.pt")
    torch.testing.assert_close(ours.log_softmax(-1), trained.log_softmax(-1), rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in policy.model.parameters())


def test_runs_without_a_model_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text("")
    with pytest.raises(ModelError, match="no checkpoint with a model yet"):
        resolve(tmp_path / "run")
    with pytest.raises(ModelError, match="no such checkpoint"):
        resolve(tmp_path / "run" / "checkpoints" / "step-00000009")
    with pytest.raises(ModelError, match=r"holds runs \(run\), so name one of them"):
        resolve(tmp_path)


def test_without_links_a_file_names_the_checkpoint(base: Path, tmp_path: Path) -> None:
    """Where a file system has no links, `best` is a text file; a run whose best is gone falls back to its last."""
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000001").mkdir(parents=True)
    os.symlink(base, checkpoints / "step-00000001" / "model")
    (tmp_path / "run" / "config.toml").write_text("")
    (checkpoints / "best").write_text("step-00000007\n")
    (checkpoints / "last").write_text("step-00000001\n")
    assert resolve(tmp_path / "run") == checkpoints / "step-00000001" / "model"
    assert resolve(checkpoints / "last") == checkpoints / "step-00000001" / "model"
    with pytest.raises(ModelError, match="no such checkpoint"):
        resolve(checkpoints / "best")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file(stored, folder / WEIGHTS)

    return rewrite


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "not lora": (_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "dora": (_config(use_dora=True), "use_dora cannot be merged"),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "transposed layers": (_config(fan_in_fan_out=True), "fan_in_fan_out"),
    "another rank": (_config(r=4), r"with r = 4"),
    "no number": (_config(lora_alpha=None), "lora_alpha is None"),
    "half a pair": (_weights(lambda w: w.pop(Q.format("B"))), "no pair of lora_A and lora_B"),
    "the other half": (_weights(lambda w: w.pop(Q.format("A"))), "no pair of lora_A and lora_B"),
    "a magnitude": (_weights(lambda w: w.update({"a.lora_magnitude_vector": torch.ones(2)})), "lora_magnitude"),
    "another width": (_weights(lambda w: w.update({Q.format("A"): torch.ones(3, 5)})), r"\[32, 5\] but the base"),
    "another layer": (
        _weights(lambda w: w.update({Q.format(x).replace("s.0", "s.9"): w[Q.format(x)].clone() for x in "AB"})),
        "layers.9.* which the base model does not have",
    ),
    "nothing": (_weights(lambda w: w.clear()), "no tensor"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no such file"),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "damaged or cut short"),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no JSON object"),
}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(([a-z_.0-9]+)+)+!", "may compare for ever"),
        (r"(a|b)*c", "may compare for ever"),
        (r".*.*.*.*.*!", "may compare for ever"),
        ("(.|.)" * 12 + "!", "may compare for ever"),
        (r"a{1,9}", "may compare for ever"),
        ("q" * 201, "may compare for ever"),
        (r"(?i)q_proj", "is no regular expression"),
        (r"\2q", "is no regular expression"),
        (r"(q", "is no regular expression"),
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_cannot_be_compared(tmp_path: Path, key: str, pattern: str, said: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, key: {pattern: 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{key}: .* {said}"):
        adapter_config(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        r"^model\.layers\.\d+\.self_attn\.q_proj$",
        r".*\.(0|1|2)\.self_attn\.(q|v)_proj",
        r"layers\.[0-9]+\.(?:q_proj|v-proj)",
    ],
)
def test_patterns_as_peft_writes_them(tmp_path: Path, pattern: str) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {pattern: 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_config(tmp_path)["rank_pattern"] == {pattern: 4}


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
def test_adapters_that_are_their_own_base(tmp_path: Path, names: str) -> None:
    for name, base in zip(names, names[1:] + names[:1], strict=True):
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"base_model_name_or_path leads back to .*a; say the model with --base"):
        resolve(tmp_path / "a")


def test_adapters_of_adapters(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))
    for name in "ab":
        make_adapter(base, tmp_path / name)
    _config(base_model_name_or_path=str(tmp_path / "a"))(tmp_path / "b")
    twice = load_model(base)
    for name in "ab":
        merge_adapters(twice, tmp_path / name)
    found = dict(load_model(resolve(tmp_path / "b")).named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in twice.named_parameters())


def test_a_run_whose_configuration_cannot_be_read(run: Path) -> None:
    (run / "config.toml").write_text("model = " + "[" * 50_000)
    folder = run / "checkpoints" / "last" / "model"
    _config(base_model_name_or_path=None)(folder)
    with pytest.raises(ModelError, match=r"which model it started from cannot be read .*; say it with --base"):
        base_source(folder)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(base: Path, tmp_path: Path, kind: str) -> None:
    spoil, message = REFUSED[kind]
    make_adapter(base, tmp_path / "a")
    spoil(tmp_path / "a")
    model = load_model(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match=message):
        merge_adapters(model, tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@settings(max_examples=30)
@given(rubbish=st.binary(max_size=200))
def test_rubbish_is_a_model_error(tmp_path_factory: pytest.TempPathFactory, rubbish: bytes) -> None:
    folder = tmp_path_factory.mktemp("rubbish")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    (folder / WEIGHTS).write_bytes(rubbish)
    with pytest.raises(ModelError):
        merge_adapters(torch.nn.Linear(2, 2), folder)
    (folder / "adapter_config.json").write_bytes(rubbish)
    with pytest.raises(ModelError):
        merge_adapters(torch.nn.Linear(2, 2), folder)


@pytest.mark.slow
def test_the_merged_real_model_agrees_with_peft(smollm2_folder: Path, tmp_path: Path) -> None:
    make_adapter(smollm2_folder, tmp_path / "a", r=8, std=0.02)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2_folder), tmp_path / "a")
    model = merged(smollm2_folder, tmp_path / "a")
    with torch.no_grad():
        ours = model.logits(model(TOKENS, PackedContext([len(TOKENS)]))).log_softmax(-1)
        torch.testing.assert_close(ours, peft(TOKENS[None]).logits[0].log_softmax(-1), rtol=0, atol=1e-3)
