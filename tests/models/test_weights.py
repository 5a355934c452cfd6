"""Folders of weights: round trips, one line that names every mismatch, atomic writes, and networks from folders."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_network
from transformers import AutoModelForCausalLM

from upslope.errors import ModelError, RunError
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder
from upslope.models.files import weights
from upslope.models.files.folders import new_folder, provenance
from upslope.models.files.loading import load_model, save_model
from upslope.models.files.weights import check_shapes, load, read_shapes, save_folder

SHAPES = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    min_size=1,
    max_size=8,
)


@given(shapes=SHAPES, shard=st.integers(1, 300), half=st.booleans())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], shard: int, half: bool
) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    dtype = torch.bfloat16 if half else None
    folder = save_folder(
        tmp_path_factory.mktemp("w") / "m", {"model_type": "x"}, tensors, dtype=dtype, max_shard_bytes=shard
    )
    assert read_shapes(folder) == {name: tuple(shape) for name, shape in shapes.items()}
    back = load(folder, torch.float32)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor.bfloat16().float() if half else tensor)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "x", "dtype": "bfloat16" if half else "float32"}


def test_shards_hold_at_most_the_limit_and_transformers_reads_them(tmp_path: Path) -> None:
    network = tiny_network("llama")
    folder = save_folder(
        tmp_path / "m", network.config.to_dict(), dict(network.named_parameters()), max_shard_bytes=20_000
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(folder / file).values()) <= 20_000 for file in files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in network.parameters())
    tokens = torch.randint(96, (1, 20))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens).logits, network(tokens).logits)


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    """Overwriting a file in place must not reach tensors that were read from it."""
    folder = save_folder(tmp_path / "m", {}, {"a": torch.ones(1000)})
    state = load(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert state["a"].sum() == 1000


def test_views_of_one_buffer_are_saved_as_themselves(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    folder = save_folder(tmp_path / "m", {}, {"a": flat[:4], "b": flat[4:].view(2, 3), "c": flat.view(5, 2).T})
    back = load(folder)
    assert torch.equal(back["a"], flat[:4])
    assert torch.equal(back["b"], flat[4:].view(2, 3))
    assert torch.equal(back["c"], flat.view(5, 2).T)


def test_every_kind_of_mismatch_in_one_line() -> None:
    expected = {"a": (2, 3), "b": (4,), **{f"m{i}": (1,) for i in range(6)}}
    with pytest.raises(ModelError) as caught:
        check_shapes(expected, {"a": (3, 2), "b": (4,), "z": (1,)}, where="folder")
    message = str(caught.value)
    assert "\n" not in message
    assert "6 missing (m0, m1, m2, m3 and 2 more)" in message
    assert "1 unexpected (z)" in message
    assert "1 misshapen (a is [3, 2] instead of [2, 3])" in message


@given(share=st.floats(0.0, 0.999))
def test_a_cut_file_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = save_folder(tmp_path_factory.mktemp("w") / "m", {}, {"a": torch.ones(50), "b": torch.ones(3, 3)})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read, damaged or cut short"):
        load(folder)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"no model.safetensors and no model.safetensors.index.json"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"pickle weights \(pytorch_model.bin\), which can run code"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "no usable weight_map"),
        ('{"weight_map": {"a": "../secret"}}', "no usable weight_map"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', r"1 shards missing \(model-1.safetensors\)"),
    ):
        index.write_text(text)
        with pytest.raises(ModelError, match=message):
            load(tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model-1.safetensors")
    assert read_shapes(tmp_path) == {}
    with pytest.raises(ModelError, match=r"1 missing \(a\)"):
        load(tmp_path, names=["a"])


def test_a_tied_head_is_written_once_and_a_different_one_refused(tmp_path: Path) -> None:
    embedding = torch.randn(5, 3)
    state = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    folder = save_folder(tmp_path / "m", {"tie_word_embeddings": True}, state)
    assert list(load(folder)) == ["model.embed_tokens.weight"]
    with pytest.raises(ModelError, match="differs from"):
        save_folder(tmp_path / "n", {"tie_word_embeddings": True}, state | {"lm_head.weight": embedding + 1})
    assert not (tmp_path / "n").exists()


def test_companions_come_along_and_explicit_ones_win(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "notes.txt"):
        (source / name).write_text(f"from source: {name}")
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    folder = save_folder(
        tmp_path / "m",
        {},
        {"a": torch.ones(1)},
        source_folder=source,
        generation_config={"eos_token_id": 7},
        record={"kind": "folder"},
    )
    assert (folder / "tokenizer.json").read_text() == "from source: tokenizer.json"
    assert provenance(folder) == {"kind": "folder"}
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not (folder / "notes.txt").exists()


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "m", {}, {"a": torch.ones(1)})
    with pytest.raises(RunError, match="already exists"):
        save_folder(folder, {}, {"a": torch.zeros(1)})
    assert load(folder)["a"].item() == 1
    save_folder(folder, {}, {"a": torch.zeros(1)}, overwrite=True)
    assert load(folder)["a"].item() == 0
    assert _names(tmp_path) == ["m"]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_failing_disk_leaves_the_old_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    folder = save_folder(tmp_path / "m", {}, {"a": torch.ones(1)})
    real, calls = os.replace, []

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == fails_at:
            full()
        real(source, target)

    if fails_at:
        monkeypatch.setattr(os, "replace", replace)
    else:
        monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(RunError, match="No space left on device; free space"):
        save_folder(folder, {}, {"a": torch.zeros(1)}, overwrite=True)
    monkeypatch.undo()
    assert load(folder)["a"].item() == 1
    assert [n for n in _names(tmp_path) if not n.startswith(".m.old-")] == ["m"]


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def half_written() -> None:
        with new_folder(tmp_path / "m") as temp:
            (temp / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_written()
    assert _names(tmp_path) == []


def test_an_unwritable_place_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        save_folder(tmp_path / "file" / "m", {}, {"a": torch.ones(1)})


def _logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens, PackedContext([len(tokens)])))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_decoder_says_what_transformers_says(tmp_path: Path, kind: str, tied: bool) -> None:
    network = tiny_network(kind, tie_word_embeddings=tied)
    network.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert isinstance(model, Decoder)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in network.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())
    tokens = torch.randint(96, (50,))
    theirs = network(tokens[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(_logits(model, tokens).log_softmax(-1), theirs, atol=1e-5, rtol=0)
    assert load_model(tmp_path / "m", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_keys_left_out_mean_transformers_defaults(tmp_path: Path) -> None:
    """Qwen3's default head width is 128, whatever hidden_size / heads is; its rope base 10000."""
    network = tiny_network("qwen3", head_dim=128)
    network.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for key in ("head_dim", "rope_parameters", "rms_norm_eps", "attention_bias", "tie_word_embeddings"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    tokens = torch.randint(96, (30,))
    ours, theirs = _logits(load_model(tmp_path / "m"), tokens), network(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_folder_that_does_not_fit_its_config_is_refused_in_one_line(tmp_path: Path) -> None:
    network = tiny_network("llama")
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.norm.weight"]
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    state["extra"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    for part in (
        "1 missing (model.norm.weight)",
        "1 unexpected (extra)",
        "up_proj.weight is [3, 3] instead of [64, 32]",
    ):
        assert part in message
    assert "\n" not in message


def test_a_stored_copy_of_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    network = tiny_network("llama", tie_word_embeddings=True)
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path).spec.vocab_size == 96
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="ties the head to the embedding"):
        load_model(tmp_path)


def test_a_reward_models_trunk_loads(tmp_path: Path) -> None:
    network = tiny_network("llama", tie_word_embeddings=False)
    network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    with_score = state | {"score.weight": torch.ones(1, 32)}
    save_file(with_score, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(96, (9,))
    hidden = load_model(tmp_path)(tokens, PackedContext([9]))
    torch.testing.assert_close(hidden, network.model(tokens[None]).last_hidden_state[0], atol=1e-5, rtol=0)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing \(lm_head.weight\)"):
        load_model(tmp_path)


def test_quantised_folders_are_refused(tmp_path: Path) -> None:
    network = tiny_network("llama")
    network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantised"):
        load_model(tmp_path)


def test_masters_are_saved_in_place_of_the_models_rounded_weights(tmp_path: Path) -> None:
    network = tiny_network("qwen2", tie_word_embeddings=True)
    network.save_pretrained(tmp_path / "m")
    masters = {name: p.detach().clone() for name, p in load_model(tmp_path / "m").named_parameters()}
    model = load_model(tmp_path / "m", dtype=torch.bfloat16)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    folder = save_model(model, tmp_path / "out", tensors=masters, source_folder=tmp_path / "m")
    assert (folder / "tokenizer.json").is_file()
    back = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert back.dtype == torch.float32
    tokens = torch.randint(96, (1, 30))
    assert torch.equal(back(tokens).logits, network(tokens).logits)
    half = save_model(model, tmp_path / "half", tensors=masters, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16
    masters.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"weights to save: .*1 missing \(model.norm.weight\)"):
        save_model(model, tmp_path / "bad", tensors=masters)
