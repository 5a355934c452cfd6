"""Encoder-decoder folders: Marian's and Pegasus' layouts of weights into models.seq2seq.network and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.files.config_json import check_sizes, transformers_config
from upslope.models.files.folders import read_config
from upslope.models.files.weights import check_shapes, load, read_shapes
from upslope.models.seq2seq.config import SEQ2SEQ_TYPES, Seq2SeqConfig
from upslope.models.seq2seq.layers import sinusoids
from upslope.models.seq2seq.network import Seq2Seq

_BIAS, _SCORE = "final_logits_bias", "score.weight"
_SHARED, _SOURCE, _TARGET, _HEAD = (
    *("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    "lm_head.weight",
)
_POSITIONS = tuple(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))


def is_seq2seq(raw: Mapping[str, Any]) -> bool:
    """True for a config.json whose network models.seq2seq.network runs."""
    return raw.get("model_type") in SEQ2SEQ_TYPES


def seq2seq_config(folder: Path | str) -> Seq2SeqConfig:
    """The folder's configuration; keys that config.json leaves out get transformers' defaults for the architecture."""
    raw = read_config(folder)
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}: holds quantised weights; training needs the unquantised model")
    full = transformers_config(folder).to_dict()
    defaults = {key: value for key, value in full.items() if value is not None}
    config = Seq2SeqConfig.from_hf({**defaults, **{k: v for k, v in raw.items() if v is not None or k not in defaults}})
    extra = {key: value for key, value in config.extra.items() if key in raw}
    return Seq2SeqConfig(**{**vars(config), "extra": extra})


def load_seq2seq(folder: Path | str, *, dtype: torch.dtype, gradient_checkpointing: bool = False) -> Seq2Seq:
    """The network of a Marian or Pegasus folder.

    Tables of positions that a folder stores must be the sinusoids; copies of the shared embedding must be equal to it.
    A final_logits_bias that is not zero is kept as a constant column of the head. Raises ModelError as load_model does.
    """
    config = seq2seq_config(folder)
    found = read_shapes(folder)
    check_sizes(vars(config), found, Path(folder) / "config.json")
    with torch.device("meta"):
        model = Seq2Seq(config, gradient_checkpointing=gradient_checkpointing)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found.pop(_SCORE, None)
    bias = load(folder, dtype, names=[_BIAS])[_BIAS] if found.pop(_BIAS, None) else None
    for name in _POSITIONS:
        if found.pop(name, None):
            _check_positions(folder, name)
    state = {} if config.source_vocab_size is not None else _shared(folder, found, dtype)
    if config.source_vocab_size is not None and found.pop(_HEAD, None):
        _check_equal(folder, _HEAD, _TARGET)
    check_shapes(expected, {**found, **{name: tuple(t.shape) for name, t in state.items()}}, where=folder)
    state |= load(folder, dtype, names=[name for name in expected if name not in state])
    if bias is not None and tuple(bias.shape) != (1, config.vocab_size):
        raise ModelError(f"{folder}: {_BIAS} is {list(bias.shape)} instead of {[1, config.vocab_size]}")
    model.load_state_dict({**state, _BIAS: torch.zeros(1, config.vocab_size, dtype=dtype)}, assign=True)
    model.set_logits_bias(bias)
    return model


def stored_tensors(model: Seq2Seq, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with the fixed tensors that transformers expects to find beside them."""
    stored = {**parameters, _BIAS: model.final_logits_bias}
    if model.config.norm == "pre":
        table = sinusoids(model.config.max_position_embeddings, model.config.hidden_size).float()
        stored |= {name: table.clone() for name in _POSITIONS}
    return stored


def _shared(folder: Path | str, found: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The one embedding under its own name; its stored copies are taken out of `found`."""
    names = [name for name in (_SHARED, _TARGET, _SOURCE, _HEAD) if name in found]
    for name in names[1:]:
        _check_equal(folder, name, names[0])
    for name in names:
        del found[name]
    return {_SHARED: load(folder, dtype, names=names[:1])[names[0]]} if names else {}


def _check_equal(folder: Path | str, first: str, second: str) -> None:
    pair = load(folder, names=[first, second])
    if not torch.equal(pair[first], pair[second]):
        raise ModelError(f"{folder}: {first} differs from {second}, but config.json makes them one matrix")


def _check_positions(folder: Path | str, name: str) -> None:
    stored = load(folder, torch.float64, names=[name])[name]
    gap = (stored - sinusoids(*stored.shape)).abs().max()
    if not float(gap) < 0.02:  # bfloat16 rounds to 0.004
        raise ModelError(f"{folder}: {name} is not the table of sinusoids, the only positions this network has")
