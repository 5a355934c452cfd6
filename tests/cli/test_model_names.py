"""One way to name a model: every verb takes every kind of name, and says what a name is that it cannot take."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from model_places import make_place
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

from upslope.build import load_inference, load_policy
from upslope.cli import main
from upslope.commands.serve import _service
from upslope.errors import ModelError
from upslope.models.files.loading import load_model
from upslope.models.files.sources import resolve
from upslope.options import ServeOptions, SFTOptions
from upslope.recipes.distill import load_teacher
from upslope.rewards.networks import load_likelihood
from upslope.rewards.summands import Surroundings

NAMES = ("folder", "run", "run/checkpoints/best", "run/checkpoints/step-00000002", "adapters", "copy", "nested")
VERBS = {
    "eval": ["eval", "NAME", "--perplexity", "text.txt", "--dtype", "float32"],
    "generate": ["generate", "NAME", "--prompt", "Say it.", "--max-tokens", "2"],
    "chat": ["chat", "NAME", "--max-tokens", "2"],
    "export": ["export", "NAME", "--output", "out"],
    "sft": ["sft", "--model", "NAME", "--data", "rows.jsonl", "--dry-run"],
    "sft with adapters": ["sft", "--model", "NAME", "--data", "rows.jsonl", "--dry-run", "--lora-rank", "2"],
    "dpo": ["dpo", "--model", "NAME", "--data", "pairs.jsonl", "--dry-run"],
    "reward": ["reward", "--model", "NAME", "--data", "pairs.jsonl", "--dry-run"],
    "grpo": ["grpo", "--model", "NAME", "--num-train-prompts", "8", "--num-prompts", "2", "--dry-run"],
    "critic": ["ppo", "--model", "NAME", "--critic", "separate", "--num-train-prompts", "8", "--dry-run"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSLOPE_HOME", str(place / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        os.symlink(path, tmp_path / path.name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_every_name(
    verb: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say it.\n"))
    assert main([word if word != "NAME" else name for word in VERBS[verb]]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_model_wherever_it_is_given(name: str) -> None:
    """To be used, to be trained, as a folder, as teacher and as the judge of likelihood: the same weights."""
    used = load_inference(name, dtype="float32")
    expected = dict(used.model.named_parameters())
    start = load_policy(SFTOptions(model=name, data="x", dtype="float32"))
    serves = _service("m", name, ServeOptions(model=name, dtype="float32", max_batch=2, kv_cache_gb=0.01))
    judge = load_likelihood(name, dtype="float32", around=Surroundings(start.tokenizer, "cpu", start.folder))
    for model in (
        start.model,
        load_model(resolve(name)),
        load_teacher(name, start),
        judge.model,
        serves.engine.model,
    ):
        for key, x in model.named_parameters():
            torch.testing.assert_close(x.detach(), expected[key].detach(), rtol=0, atol=1e-7, msg=key)
    base = dict(load_model("folder").named_parameters())
    assert any(not torch.equal(x, base[key]) for key, x in expected.items()) == (name != "folder")


def test_adapters_are_merged_once_and_again_when_they_change(place: Path) -> None:
    first = resolve("copy")
    assert resolve("copy") == first
    config = json.loads(Path("copy/adapter_config.json").read_text())
    Path("copy/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    changed = resolve("copy")
    assert changed != first
    weights = [dict(load_model(folder).named_parameters()) for folder in (first, changed)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    Path("copy/adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/nope", "runs/nope: no such folder; runs holds first, second"),
        ("runs/secnd", "runs/secnd: no such folder; did you mean runs/second?"),
        ("runs/first/best", "did you mean runs/first/checkpoints/best?"),
        ("runs/first/step-7", "no such folder; runs/first/checkpoints holds best, step-00000002"),
        ("folder/model", "folder/model: no such folder; give a model folder"),
        ("./nope/", "no such folder"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "generate", "export", "sft"])
def test_a_path_that_is_not_there_names_what_is(
    verb: str, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in ("runs/first/checkpoints/best", "runs/first/checkpoints/step-00000002", "runs/second"):
        Path(made).mkdir(parents=True)
    Path("runs/first/config.toml").write_text("")
    assert main([word if word != "NAME" else name for word in VERBS[verb]]) == 4
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "hub (" not in said
    assert "\n" not in said


def test_no_runs_at_all_is_no_hub_either() -> None:
    with pytest.raises(ModelError, match=r"^runs/nope: no such folder; give a model folder"):
        resolve("runs/nope")


def _bert(network: type, **changes: int) -> Path:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8) | {"num_hidden_layers": 1, "num_attention_heads": 2}
    network(BertConfig(vocab_size=258, **sizes, **changes)).save_pretrained("odd")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.symlink(Path("folder", file).resolve(), Path("odd", file))
    return Path("odd")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (BertForSequenceClassification, "is a classifier and writes no text; upslope eval"),
        (BertForTokenClassification, "is a tagger and writes no text; upslope eval"),
        (BertForMaskedLM, "is an encoder and writes no text; upslope classify or tag --model"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "chat", "sft", "dpo", "grpo"])
def test_a_model_that_writes_no_text_says_which_verb_takes_it(
    verb: str, network: type, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    _bert(network)
    capfd.readouterr()
    assert main([word if word != "NAME" else "odd" for word in VERBS[verb]]) == 4
    said = capfd.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("verb", ["generate", "chat", "sft", "grpo"])
def test_a_reward_model_writes_no_text_but_can_be_trained_on(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    training = ["--max-steps", "1", "--output-dir", "rm", "--eval-every", "0", "--eval-data", "pairs.jsonl"]
    assert main(["reward", "--model", "folder", "--data", "pairs.jsonl", *training]) == 0
    capsys.readouterr()
    assert main([word if word != "NAME" else "rm" for word in VERBS[verb]]) == 4
    assert "is a reward model and writes no text; upslope eval" in capsys.readouterr().err
    assert main(["reward", "--model", "rm", "--data", "pairs.jsonl", "--dry-run"]) == 0
    assert main(["eval", "rm", "--preferences", "pairs.jsonl"]) == 0
