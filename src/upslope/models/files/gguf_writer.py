"""Our decoder's families as GGUF files for llama.cpp: the reverse of models.files.gguf, which reads them back.

Matrices are stored in the number type asked for, norms and biases in float32, as llama.cpp wants them. The rows of
llama's query and key projections are put into the order of its rotary kernel. Format: ggml's docs/gguf.md.

A tokenizer is stored as tokens, their kinds, merges, and the name of the split before the merges. llama.cpp does not
read how a byte-level vocabulary cuts text before it merges; it knows some dozens of ways by name
("tokenizer.ggml.pre"). Its own converter finds the name by a hash of the ids of one test text, so only of vocabularies
it has seen. Here the way of cutting itself is compared, which also names the split of a new vocabulary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from upslope.data.pieces import steps_of
from upslope.errors import ModelError
from upslope.models.decoder.network import DecoderConfig, rope_frequencies
from upslope.models.files.gguf import expected_shapes, gguf_names, rotary_heads
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

    tensors: by Hugging Face's names, any floating dtype. split: see `read_vocab`. about: `general.*` entries
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
        for name, value in {**_shape(config), **vocab, **_ends(tokenizer, eos_token_ids)}.items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        _write_tensors(writer, config, arch, tensors, kind)
    finally:
        writer.close()


def as_stored(tensor: Tensor, kind: GGUFType) -> Tensor:
    """The float32 values that a file of type `kind` holds for a tensor."""
    array, stored = _encode(tensor, kind, "tensor")
    return torch.from_numpy(gguf.dequantize(array, stored).copy()).view(tensor.shape)


def rope_order(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * d, ...]: halves (i, i + d/2) to pairs (2i, 2i+1)."""
    return rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _architecture(config: DecoderConfig) -> str:
    """llama.cpp's name of the architecture; ModelError for what its graph of that name does not compute."""
    if (arch := _ARCHITECTURES[config.model_type]) == "qwen3" and config.attention_bias:
        raise ModelError("a qwen3 network with attention_bias cannot be written as GGUF: llama.cpp has no such biases")
    if config.rope["rope_type"] == "llama3" and arch != "llama":
        raise ModelError(f"a {arch} network with llama3 rotary scaling cannot be written as GGUF; llama.cpp ignores it")
    return arch


def _shape(config: DecoderConfig) -> dict[str, Any]:
    """The hyperparameters by GGUFWriter's names of them; what is None is left out."""
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


# What a token is, by the numbers of llama.cpp's llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_TOKEN_NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (how text is cut, whether a piece that is a token is taken whole) -> llama.cpp's name. Names that share an entry in
# llama.cpp (smollm, starcoder, refact, command-r) cut alike.
_SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes of gpt-2's words",), False): "gpt-2",
    (("single digits", "bytes of gpt-2's words"), False): "smollm",
    ((rf"{_LETTERS}|\p{{N}}|{_REST}", "bytes"), False): "qwen2",
    ((rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), True): "llama-bpe",
    ((rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "bytes"), False): "dbrx",
    ((_TEKKEN, "bytes"), True): "tekken",
}


def read_vocab(tokenizer: Any, size: int, *, split: str | None = None) -> dict[str, Any]:
    """The vocabulary of a fast tokenizer for a model of `size` embedding rows; rows without a token get a name.

    The keys are GGUFWriter's names of the entries; scores and the space prefix are SentencePiece's, merges byte-level
    BPE's. `split` is llama.cpp's name of the split, for a byte-level tokenizer whose way of cutting is not known here.
    Raises ModelError for tokenizers that llama.cpp cannot run: not BPE, another normaliser, other pieces around a text.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"the tokenizer is a {model['type']}; a GGUF file can hold byte-level or SentencePiece BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError("the tokenizer marks word ends or continuations, which llama.cpp's BPE does not know")
    tokens, kinds = _tokens(tokenizer, size)
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    frame = dict(zip(("add_bos_token", "add_eos_token"), _frame(tokenizer), strict=True))
    common = {"token_list": tokens, "token_types": kinds}
    if model.get("byte_fallback"):
        if split is not None:
            raise ModelError(f"--pre-tokenizer {split}: a SentencePiece vocabulary is not cut before its merges")
        kinds[:] = [BYTE if k == NORMAL and _BYTE_TOKEN.fullmatch(t) else k for t, k in zip(tokens, kinds, strict=True)]
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = UNKNOWN
        pieces = {"token_scores": _scores(tokens, kinds, merges), "add_space_prefix": _space_prefix(state)}
        return {"tokenizer_model": "llama", "tokenizer_pre": "default", **common, **pieces, **frame}
    if not merges:
        raise ModelError("the tokenizer has single bytes and no merges; a GGUF file cannot say so")
    written = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
    name = split or _split_name(state)
    return {"tokenizer_model": "gpt2", "tokenizer_pre": name, **common, "token_merges": written, **frame}


def pinned_template(template: str, tokenizer: Any, *, bos: int | None, eos: int | None) -> str:
    """The chat template, led by settings of those special tokens' names in it that llama.cpp would write otherwise.

    llama.cpp writes a token of its own choice for a BOS or EOS that the file (`bos`, `eos`) does not name, and nothing
    for the names of other tokens; transformers writes the tokenizer's tokens, and nothing for one that it lacks.
    """
    theirs = dict.fromkeys(_TOKEN_NAMES, "")
    for name, token in (("bos_token", bos), ("eos_token", eos)):
        theirs[name] = None if token is None else tokenizer.convert_ids_to_tokens(token)
    ours = {name: getattr(tokenizer, name) or "" for name in theirs if re.search(rf"\b{name}\b", template)}
    lead = [f"{{%- set {name} = {_quoted(text)} -%}}" for name, text in ours.items() if text != theirs[name]]
    if not lead or template.startswith("".join(lead).removesuffix("-%}")):  # read from such a file
        return template
    if template[0].isspace():  # which `-%}` would remove; a newline after a block is removed alone
        lead[-1] = lead[-1].removesuffix("-%}") + "%}\n"
    return "".join(lead) + template


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """Token text and kind of every embedding row."""
    if (by_id := {i: text for text, i in tokenizer.get_vocab().items()}) and max(by_id) >= size:
        raise ModelError(f"the tokenizer has token {max(by_id)}, but the model's embedding only {size} rows")
    added = tokenizer.added_tokens_decoder
    kinds = [NORMAL if i in by_id else UNUSED for i in range(size)]
    for i in by_id.keys() & added.keys():
        kinds[i] = CONTROL if added[i].special else USER_DEFINED
    return [by_id.get(i, f"[PAD{i}]") for i in range(size)], kinds


def _frame(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its BOS before a text and its EOS behind it."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for add_bos, add_eos in product((False, True), repeat=2):
        if framed == bos * add_bos + plain + eos * add_eos:
            return add_bos, add_eos
    raise ModelError("the tokenizer puts tokens around a text that are not its BOS and EOS; llama.cpp cannot do that")


def _scores(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores under which SentencePiece merges in the same order: a piece's is minus the rank of its first merge."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    last = float(len(merges))
    return [-float(ranks.get(t, last)) if k == NORMAL else 0.0 for t, k in zip(tokens, kinds, strict=True)]


def _space_prefix(state: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; ModelError where it does more than that."""
    normalizers, splits = steps_of(state, "normalizer"), steps_of(state, "pre_tokenizer")
    if (kinds := [part["type"] for part in normalizers + splits]) in (["Prepend", "Replace"], ["Replace"]):
        replace = normalizers[-1]
        if replace["pattern"] == {"String": " "} and replace["content"] == _SPACE:
            return kinds[0] == "Prepend"
    if kinds == ["Metaspace"] and splits[0]["replacement"] == _SPACE and not splits[0].get("split", True):
        return splits[0].get("prepend_scheme", "always") != "never"
    raise ModelError(f"the tokenizer prepares text by {', '.join(kinds) or 'nothing'}, which llama.cpp's cannot do")


def _split_name(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way a byte-level tokenizer cuts text."""
    kinds = [part["type"] for part in steps_of(state, "normalizer")]
    if kinds not in ([], ["NFC"]):  # llama.cpp has no NFC; text mostly is in it
        raise ModelError(
            f"the tokenizer normalises text by {', '.join(kinds)}, which llama.cpp's byte-level BPE cannot do"
        )
    parts = tuple(map(_describe, steps_of(state, "pre_tokenizer")))
    if (name := _SPLITS.get((parts, bool(state["model"].get("ignore_merges"))))) is None:
        raise ModelError(
            f"the tokenizer cuts text by {' then '.join(parts) or 'nothing'}, for which no name of llama.cpp is known "
            "here; if llama.cpp has one, give it with --pre-tokenizer and check it with --verify"
        )
    return name


def _describe(part: Mapping[str, Any]) -> str:
    """One step of cutting in words, or the regular expression it cuts by."""
    if part["type"] == "Digits" and part.get("individual_digits"):
        return "single digits"
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes of gpt-2's words" if part.get("use_regex", True) else "bytes"
    pattern = part.get("pattern", {})
    if part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return "single digits" if pattern == {"Regex": r"\p{N}"} else pattern.get("Regex", json.dumps(pattern))
    return json.dumps(part, ensure_ascii=False)
