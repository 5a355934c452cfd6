"""Our decoder's families as GGUF files for llama.cpp: the reverse of models.files.gguf, which reads them back.

Matrices are stored in the number type asked for, norms and biases in float32, as llama.cpp wants them. The rows of
llama's query and key projections are put into the order of its rotary kernel. Format: ggml's docs/gguf.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.decoder.network import DecoderConfig, rope_frequencies
from upslope.models.files.gguf import expected_shapes, gguf_names, rotary_heads
from upslope.models.files.gguf_vocab import pinned_template, read_vocab
from upslope.models.files.weights import check_shapes

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
        _add(writer, {**_shape(config), **vocab, **_ends(tokenizer, eos_token_ids)})
        _write_tensors(writer, config, arch, tensors, kind)
    finally:
        writer.close()


def as_stored(tensor: Tensor, kind: GGUFType) -> Tensor:
    """The float32 values that a file of type `kind` holds for a tensor."""
    array, stored = _encode(tensor, kind, "tensor")
    return torch.from_numpy(gguf.dequantize(array, stored).copy()).view(tensor.shape)


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


def _add(writer: gguf.GGUFWriter, values: Mapping[str, Any]) -> None:
    """Metadata by the writer's names of them; what is None is left out."""
    for name, value in values.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def _shape(config: DecoderConfig) -> dict[str, Any]:
    """The hyperparameters."""
    linear = config.rope["rope_type"] == "linear"
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_scaling_type": gguf.RopeScalingType.LINEAR if linear else None,
        "rope_scaling_factor": config.rope["factor"] if linear else None,
    }


def _ends(tokenizer: Any, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """The special tokens and the chat templates."""
    own = tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([own] if own in eos_token_ids else []), *eos_token_ids]))
    if len(ends) > 3:
        raise ModelError(
            f"a turn ends at any of {len(ends)} tokens ({', '.join(map(str, ends))}), a GGUF file can name three; "
            "shorten eos_token_id in generation_config.json"
        )
    eos, eot, eom, *_ = [*(ends or [own]), None, None, None]
    named = tokenizer.chat_template or None
    several = isinstance(named, Mapping)
    templates = {
        name: pinned_template(text, tokenizer, bos=tokenizer.bos_token_id, eos=eos)
        for name, text in (named if several else {"default": named} if named else {}).items()
    }
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos,
        "eot_token_id": eot,
        "eom_token_id": eom,
        "unk_token_id": tokenizer.unk_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": listed if several else templates.get("default"),
    }


def _write_tensors(
    writer: gguf.GGUFWriter, config: DecoderConfig, arch: str, tensors: Mapping[str, Tensor], kind: GGUFType
) -> None:
    """All tensors, one at a time converted and written; rotary factors first, where the rule has any."""
    names = gguf_names(config, arch)
    plan: list[tuple[str, str, Tensor]] = []
    if config.rope["rope_type"] == "llama3":
        plain = rope_frequencies({**config.rope, "rope_type": "default"}, config.head_dim)
        plan.append(("rope_freqs.weight", "", plain / rope_frequencies(config.rope, config.head_dim)))
    plan += [(names[name], name, tensor) for name, tensor in tensors.items()]
    for target, _, tensor in plan:
        type_ = _tensor_type(tensor, kind)
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), type_)))
        writer.add_tensor_info(target, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, name, tensor in plan:
        heads = rotary_heads(config, arch, name)
        writer.write_tensor_data(_encode(tensor if heads is None else rope_order(tensor, heads), kind, name)[0])


def _tensor_type(tensor: Tensor, kind: GGUFType) -> gguf.GGMLQuantizationType:
    """ggml's type: float32 for vectors, and float16 for rows that q8_0's blocks of 32 do not fill."""
    name = "F16" if kind == "q8_0" and tensor.shape[-1] % 32 else GGUF_TYPES[kind][0]
    return gguf.GGMLQuantizationType["F32" if tensor.ndim < 2 else name]


def _encode(tensor: Tensor, kind: GGUFType, name: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The bytes of a tensor and their ggml type. ModelError for values that the type cannot hold."""
    type_ = _tensor_type(tensor, kind)
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    largest = float(values.abs().max()) if values.numel() else 0.0
    limit = {"F16": 65504.0, "Q8_0": 65504.0 * 127}.get(type_.name, float(torch.finfo(torch.bfloat16).max))
    if not largest <= limit:
        raise ModelError(f"{name} holds {largest:g}, which {type_.name} cannot hold; export it as float32 or bfloat16")
    return gguf.quantize(values.numpy(), type_), type_
