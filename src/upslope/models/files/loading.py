"""A folder into a network and back: our decoder where it can run the model exactly, the adapter elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.decoder.network import MODEL_TYPES, Decoder, DecoderConfig, rope_frequencies
from upslope.models.files.config_json import SCORE, check_config, check_sizes, check_writes, transformers_config
from upslope.models.files.folders import (
    GENERATION_CONFIG,
    check_intact,
    copy_companions,
    new_folder,
    read_config,
    write_json,
)
from upslope.models.files.weights import Tokenizer, check_shapes, load, read_shapes, save_folder
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.models.lstm import MODEL_TYPE as LSTM_TYPE
from upslope.models.protocol import CausalModel
from upslope.models.seq2seq.layers import is_seq2seq
from upslope.models.seq2seq.network import Seq2Seq, load_seq2seq, stored_tensors

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IGNORED_ENDINGS = (".rotary_emb.inv_freq",)  # tables that old checkpoints stored; they are computed here
# Keys whose absence in config.json means the library's default for the architecture, not ours.
_DEFAULTED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias"),
    *("mlp_bias", "tie_word_embeddings", "initializer_range", "rope_parameters", "sliding_window"),
)


def load_model(
    folder: Path | str, *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False, trunk: bool = False
) -> CausalModel:
    """The network of a model folder with its weights in `dtype`.

    Decoder for llama, mistral, qwen2 and qwen3 folders it can run exactly, LSTM for its own, Seq2Seq for marian and
    pegasus, TransformersModel for any other causal architecture. With `trunk` a reward model's folder (a `score.weight`
    in place of the head) gives what is under it; its logits then mean nothing. Raises ModelError, naming the folder and
    what is missing, misshapen, damaged or unsupported, or which verb takes a model that writes no text.
    """
    check_intact(folder)
    raw = read_config(folder)
    check_config(raw, Path(folder) / "config.json")
    if not trunk:
        check_writes(folder)
    if raw.get("model_type") == LSTM_TYPE:
        return _filled(LSTM, LSTMConfig.from_hf(raw), folder, dtype, gradient_checkpointing)
    if is_seq2seq(raw):
        return load_seq2seq(folder, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    config = decoder_config(folder)
    if config is None:
        from upslope.models.transformers_model import TransformersModel

        return TransformersModel.from_folder(folder, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    model = _filled(Decoder, config, folder, dtype, gradient_checkpointing)
    model.rope_inverse = rope_frequencies(config.rope, config.head_dim)
    return model


def _filled(network: type[Any], config: Any, folder: Path | str, dtype: torch.dtype, checkpointing: bool) -> Any:
    """The network of a configuration with the folder's weights, every one of which must be there and fit."""
    found = {n: shape for n, shape in read_shapes(folder).items() if not n.endswith(_IGNORED_ENDINGS)}
    check_sizes(vars(config), found, Path(folder) / "config.json")
    if found.pop(SCORE, None) and _HEAD not in found:
        config = replace(config, tie_word_embeddings=True)
    with torch.device("meta"):
        model = network(config, gradient_checkpointing=checkpointing)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tie_word_embeddings and _HEAD in found and _EMBEDDING in found:
        _check_tied_copy(folder)
        del found[_HEAD]
    check_shapes(expected, found, where=folder)
    model.load_state_dict(load(folder, dtype=dtype, names=list(expected)), assign=True)
    if isinstance(model, Decoder):
        model.join_projections()
    return model


def decoder_config(folder: Path | str) -> DecoderConfig | None:
    """The folder's configuration for our decoder, or None when the adapter has to run it.

    Keys that config.json leaves out get transformers' defaults for the architecture.
    """
    raw = read_config(folder)
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}: holds quantised weights; training needs the unquantised model")
    if raw.get("model_type") not in MODEL_TYPES:
        return None
    from upslope.models.transformers_model import sliding_window

    full = transformers_config(folder)
    if sliding_window(full) is not None:
        return None
    values: dict[str, Any] = full.to_dict()
    filled = {key: values[key] for key in _DEFAULTED if key in values and raw.get(key) is None}
    if values.get("rope_parameters"):
        filled["rope_parameters"] = values["rope_parameters"]
    try:
        return DecoderConfig.from_hf({**raw, **filled})
    except ModelError:  # a variant of the family (biases, activations, rotary scalings) that transformers can run
        return None


def save_model(
    model: CausalModel,
    folder: Path | str,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    source_folder: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> Path:
    """Write `model` as a folder that transformers loads (an LSTM: only upslope); atomic (weights.save_folder).

    `tensors` (float32 master weights, say) take the place of the model's own parameters; names and shapes are
    checked. Tokenizer, chat template and generation config are copied from `source_folder`.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = dict(model.named_parameters()) if tensors is None else dict(tensors)
    check_shapes(expected, {name: tuple(t.shape) for name, t in state.items()}, where="weights to save")
    if isinstance(model, Decoder | LSTM | Seq2Seq):
        generation = None
        if isinstance(model, Seq2Seq):
            state = stored_tensors(model, state)
            if source_folder is None or not (Path(source_folder) / GENERATION_CONFIG).is_file():
                generation = model.config.generation_config()
        return save_folder(
            folder,
            model.config.to_hf(),
            state,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            source_folder=source_folder,
            tokenizer=tokenizer,
            generation_config=generation,
            overwrite=overwrite,
        )
    from upslope.models.transformers_model import TransformersModel

    if not isinstance(model, TransformersModel):
        raise ModelError(f"{type(model).__name__} is not a model that can be saved as a folder")
    # transformers writes its own model: it knows how the names in memory differ from those on disk
    kept = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    state = {
        name: t.detach().to("cpu", dtype if dtype is not None and t.is_floating_point() else t.dtype).contiguous()
        for name, t in {**kept, **state}.items()
    }
    written = next(t.dtype for t in state.values() if t.is_floating_point())
    with new_folder(folder, overwrite=overwrite) as temp:
        model.network.save_pretrained(str(temp), state_dict=state, max_shard_size=int(max_shard_bytes))
        config = read_config(temp)
        if source_folder is not None:  # the network's own has dropout switched off
            config = {k: v for k, v in read_config(source_folder).items() if k != "torch_dtype"}
            (temp / GENERATION_CONFIG).unlink(missing_ok=True)
            copy_companions(Path(source_folder), temp)
        write_json(temp / "config.json", {**config, "dtype": str(written).removeprefix("torch.")})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temp))
    return Path(folder)


def _check_tied_copy(folder: Path | str) -> None:
    """A tied folder may still store the head; it must then be the embedding."""
    pair = load(folder, names=[_HEAD, _EMBEDDING])
    if not torch.equal(pair[_HEAD], pair[_EMBEDDING]):
        raise ModelError(
            f"{folder}: config.json ties the head to the embedding but {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false to use both"
        )
