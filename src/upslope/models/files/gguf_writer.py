"""Our decoder's families as GGUF files for llama.cpp: the reverse of models.files.gguf, which reads them back.

Matrices are stored in the number type asked for, norms and biases in float32, as llama.cpp wants them. The rows of
llama's query and key projections are put into the order of its rotary kernel. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upslope.atomic import fsync_file, fsync_folder
from upslope.errors import ModelError, RunError
from upslope.models.decoder.network import DecoderConfig, rope_frequencies
from upslope.models.files.gguf import expected_shapes
from upslope.models.files.gguf_vocab import Vocab, pinned_template, read_vocab
from upslope.models.files.weights import check_shapes

__all__ = ["GGUF_TYPES", "GGUFType", "as_stored", "new_file", "rope_order", "write_gguf"]

GGUFType = Literal["float32", "bfloat16", "float16", "q8_0"]
GGUF_TYPES: dict[str, tuple[str, str]] = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""Our name of a number type -> ggml's name of a tensor's type and llama.cpp's of the file's."""

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf(
    path: Path | str,
    config: DecoderConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    *,
    kind: GGUFType = "bfloat16",
    eos_token_ids: Sequence[int] = (),
    split: str | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write `path` for llama.cpp: weights, tokenizer, chat template, and the tokens that end a turn.

    tensors: by Hugging Face's names, any floating dtype. split: see gguf_vocab.read_vocab. about: `general.*` entries
    ("name", "license", "description"). The format holds three `eos_token_ids`. Raises ModelError for
    networks, tokenizers, ends and values that would not survive.
    """
    import gguf

    arch = _architecture(config)
    check_shapes(
        expected_shapes(config), {name: tuple(t.shape) for name, t in tensors.items()}, where="weights to export"
    )
    vocab = read_vocab(tokenizer, config.vocab_size, split=split)
    writer = gguf.GGUFWriter(path, arch)
    try:
        writer.add_file_type(getattr(gguf.LlamaFileType, GGUF_TYPES[kind][1]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, text in (about or {}).items():
            writer.add_string(f"general.{key}", text)
        _add_shape(writer, config)
        _add_vocab(writer, vocab, tokenizer, eos_token_ids)
        _write_tensors(writer, gguf, config, arch, tensors, kind)
    finally:
        writer.close()


@contextmanager
def new_file(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends without an error, and vanishes otherwise.

    It is flushed to disk before the rename. Raises RunError for what the file system refuses.
    """
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise RunError(f"{path} already exists; choose another output, or --overwrite a file")
    temp: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.tmp-", suffix=path.suffix, dir=path.parent)
        temp = Path(name)
        os.close(handle)
        yield temp
        temp.chmod(0o644)
        fsync_file(temp)
        os.replace(temp, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}; free space or choose another place, then run again") from error
    finally:
        if temp is not None:
            temp.unlink(missing_ok=True)


def as_stored(tensor: Tensor, kind: GGUFType) -> Tensor:
    """The float32 values that a file of type `kind` holds for a tensor."""
    from gguf.quants import dequantize

    array, stored = _encode(tensor, kind, "tensor")
    return torch.from_numpy(dequantize(array, stored).copy()).view(tensor.shape)


def rope_order(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * d, ...]: halves (i, i + d/2) to pairs (2i, 2i+1)."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _architecture(config: DecoderConfig) -> str:
    """llama.cpp's name of the architecture; ModelError for what its graph of that name does not compute."""
    arch = _ARCHITECTURES[config.model_type]
    if arch == "qwen3" and config.attention_bias:
        raise ModelError("a qwen3 network with attention_bias cannot be written as GGUF: llama.cpp has no such biases")
    if config.rope["rope_type"] == "llama3" and arch != "llama":
        raise ModelError(f"a {arch} network with llama3 rotary scaling cannot be written as GGUF; llama.cpp ignores it")
    return arch


def _add_shape(writer: Any, config: DecoderConfig) -> None:
    """The hyperparameters, under the architecture's name."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope["factor"])


def _add_vocab(writer: Any, vocab: Vocab, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.split)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.kinds)
    if vocab.model == "gpt2":
        writer.add_token_merges(vocab.merges)
    else:
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(vocab.space_prefix)
    writer.add_add_bos_token(vocab.add_bos)
    writer.add_add_eos_token(vocab.add_eos)
    own = tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([own] if own in eos_token_ids else []), *eos_token_ids]))
    if len(ends) > 3:
        raise ModelError(
            f"a turn ends at any of {len(ends)} tokens ({', '.join(map(str, ends))}), a GGUF file can name three; "
            "shorten eos_token_id in generation_config.json"
        )
    roles = {
        "bos": tokenizer.bos_token_id,
        "eos": ends[0] if ends else own,
        "eot": ends[1] if len(ends) > 1 else None,
        "eom": ends[2] if len(ends) > 2 else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for role, token in roles.items():
        if token is not None:
            getattr(writer, f"add_{role}_token_id")(token)
    if not tokenizer.chat_template:
        return
    named = tokenizer.chat_template
    several = isinstance(named, Mapping)
    templates = {
        name: pinned_template(text, tokenizer, bos=roles["bos"], eos=roles["eos"])
        for name, text in (named if several else {"default": named}).items()
    }
    one = [{"name": name, "template": text} for name, text in templates.items()] if several else templates["default"]
    writer.add_chat_template(one)


def _write_tensors(
    writer: Any, gguf: Any, config: DecoderConfig, arch: str, tensors: Mapping[str, Tensor], kind: GGUFType
) -> None:
    """All tensors, one at a time converted and written; rotary factors first, where the rule has any."""
    stored = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    plan: list[tuple[str, str, Tensor]] = []
    if config.rope["rope_type"] == "llama3":
        plain = rope_frequencies({**config.rope, "rope_type": "default"}, config.head_dim)
        plan.append(("rope_freqs.weight", "", plain / rope_frequencies(config.rope, config.head_dim)))
    for name, tensor in tensors.items():
        plan.append((_stored_name(stored, name), name, tensor))
    for target, _, tensor in plan:
        type_ = gguf.GGMLQuantizationType[_tensor_type(tensor, kind)]
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), type_)))
        writer.add_tensor_info(target, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, name, tensor in plan:
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = rope_order(tensor, heads)
        writer.write_tensor_data(_encode(tensor, kind, name)[0])


def _stored_name(stored: Any, name: str) -> str:
    found = stored.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ModelError(f"{name}: llama.cpp has no such tensor in this architecture")
    return found


def _tensor_type(tensor: Tensor, kind: GGUFType) -> str:
    """ggml's type: float32 for vectors, and float16 for rows that q8_0's blocks of 32 do not fill."""
    if tensor.ndim < 2:
        return "F32"
    return "F16" if kind == "q8_0" and tensor.shape[-1] % 32 else GGUF_TYPES[kind][0]


def _encode(tensor: Tensor, kind: GGUFType, name: str) -> tuple[np.ndarray, Any]:
    """The bytes of a tensor and their ggml type. ModelError for values that the type cannot hold."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    type_ = GGMLQuantizationType[_tensor_type(tensor, kind)]
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    largest = float(values.abs().max()) if values.numel() else 0.0
    limit = {"F16": 65504.0, "Q8_0": 65504.0 * 127}.get(type_.name, float(torch.finfo(torch.bfloat16).max))
    if not largest <= limit:
        raise ModelError(f"{name} holds {largest:g}, which {type_.name} cannot hold; export it as float32 or bfloat16")
    return quantize(values.numpy(), type_), type_
