"""Files of a model that hold what no model can: one line names file, key, value and range, before anything is built."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_kit import encoder_folder
from tiny_model import tiny_folder, tiny_tokenizer
from tiny_seq2seq import tiny as tiny_seq2seq
from transformers import AutoConfig, AutoModelForCausalLM

from upslope import atomic
from upslope.atomic import read_object
from upslope.errors import ModelError
from upslope.models.encoder.network import load_encoder
from upslope.models.files.config_json import TABLE, check_config, check_sizes
from upslope.models.files.loading import load_model, save_model
from upslope.models.lstm import LSTM, LSTMConfig


def gpt2_folder(path: Path) -> Path:
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(path)
    return path


MADE: dict[str, Callable[[Path], Path]] = {
    "decoder": tiny_folder,
    "lstm": lambda path: save_model(LSTM(LSTMConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1)), path),
    "seq2seq": lambda path: save_model(tiny_seq2seq(), path, tokenizer=tiny_tokenizer()),
    "encoder": encoder_folder,
    "gpt2": gpt2_folder,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name) / "m") for name, make in MADE.items()}


def load(kind: str, folder: Path) -> Any:
    return load_encoder(folder, "masked") if kind == "encoder" else load_model(folder)


def refused(kind: str, source: Path, folder: Path, **changes: Any) -> str:
    """The line that names what is wrong with a copy whose config.json says something else."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load(kind, folder)
    assert time.monotonic() - began < 10
    line = str(caught.value)
    assert str(folder) in line
    assert "\n" not in line
    assert len(line) < 1500
    return line


SIZES = {
    "decoder": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps", "head_dim"),
    "lstm": ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"),
    "seq2seq": ("d_model", "encoder_layers", "decoder_ffn_dim", "max_position_embeddings", "dropout"),
    "encoder": ("hidden_size", "num_hidden_layers", "layer_norm_eps", "type_vocab_size"),
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon"),
}
WRONG = ("32", -1, True, float("nan"), float("inf"), {"a": 1}, [[]], 10**30, "x" * 5000, [1.5])


@pytest.mark.parametrize("kind", MADE)
def test_a_value_that_no_network_has(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for number, value in enumerate(WRONG):
        key = SIZES[kind][number % len(SIZES[kind])]
        line = refused(kind, folders[kind], tmp_path / str(number), **{key: value})
        assert f"config.json: {key} = {str(value)[:20] if not isinstance(value, str) else repr(value)[:20]}" in line
        assert "it must be a" in line
    if kind != "lstm":
        assert "model_type" in refused(kind, folders[kind], tmp_path / "type", model_type=3)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("decoder", "num_hidden_layers"),
        ("lstm", "num_hidden_layers"),
        ("seq2seq", "decoder_layers"),
        ("encoder", "num_hidden_layers"),
        ("gpt2", "n_layer"),
    ],
)
def test_layers_that_the_files_do_not_hold(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str
) -> None:
    """Nothing is built for them: a layer that is made fails the test."""
    made: list[object] = []
    build = torch.nn.Module.__init__

    def counted(self: torch.nn.Module, *args: Any, **options: Any) -> None:
        made.append(self)
        build(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "__init__", counted)
    line = refused(kind, folders[kind], tmp_path / "m", **{key: 4000})
    assert "= 4000, but the weight files hold" in line
    assert len(made) < 10


@pytest.mark.parametrize(("kind", "key"), [("encoder", "vocab_size"), ("gpt2", "n_positions")])
def test_sizes_that_the_files_do_not_hold(folders: dict[str, Path], tmp_path: Path, kind: str, key: str) -> None:
    """A library that builds what config.json says would take gigabytes: it is not asked."""
    changes = {key: TABLE[key][2], "hidden_size" if kind == "encoder" else "n_embd": 2**12}
    line = refused(kind, folders[kind], tmp_path / "m", **{k: int(v) for k, v in changes.items()})
    assert "weights, but the weight files hold" in line


@pytest.mark.parametrize("kind", ["decoder", "encoder", "gpt2"])
def test_labels_without_number(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """transformers writes a name for each of them."""
    line = refused(kind, folders[kind], tmp_path / "m", num_labels=10**9)
    assert "config.json: num_labels = 1000000000; it must be a whole number from 0 to 1,000,000" in line


def test_rotary_parameters(folders: dict[str, Path], tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    for number, (key, value) in enumerate({"rope_theta": "x", "factor": 0, "low_freq_factor": []}.items()):
        line = refused("decoder", folders["decoder"], tmp_path / str(number), rope_parameters={**rope, key: value})
        assert key in line
    assert "rope_parameters = 3; it must be an object" in refused(
        "decoder", folders["decoder"], tmp_path / "m", rope_parameters=3
    )


def test_what_configurations_of_others_say() -> None:
    """Real ones: a padding token of -1, null for a key that is not there, a size per layer."""
    check_config({"pad_token_id": -1, "num_key_value_heads": None, "intermediate_size": [512, 1024]}, "x")
    check_config(
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5_000_000, "eos_token_id": [1, 2]}, "x"
    )
    check_sizes({"num_hidden_layers": 12}, {f"t{i}": (3, 3) for i in range(12)}, "x", elements=2**24)


GOOD = '{"a": 1}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 80 + b"1" + b"}" * 80, "nested more than 64 deep"),
        (b'{"a": "\xff"}', "utf-8"),
        (GOOD.encode("utf-16"), "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[1]", "holds no JSON object"),
        (b"", "cannot be read as JSON"),
        (GOOD.encode() + b" " * 100, "more than 100 bytes"),
    ],
)
def test_files_that_are_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    if "100 bytes" in said:
        monkeypatch.setattr(atomic, "LARGEST", 100)
    with pytest.raises(ModelError, match=said) as caught:
        read_object(path, ModelError, "fetch it")
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("; fetch it")


def test_a_file_within_the_bounds(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [{"b": 1}, {"b": 2}], "c": {"b": NaN}}')
    assert read_object(tmp_path / "x.json", ModelError)["a"] == [{"b": 1}, {"b": 2}]
    with pytest.raises(ModelError, match="cannot be read: a folder, not a plain file"):
        read_object(tmp_path, ModelError)
