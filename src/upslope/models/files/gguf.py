"""GGUF files (llama.cpp's format) into Hugging Face folders, once, so that everything else reads one format.

Weights are de-quantised to float32, which loses nothing: bfloat16 would round the quantised values a second time.
Architectures: llama (Llama, Mistral, SmolLM2), qwen2 and qwen3. llama.cpp stores the rows of llama's query and key
projections in the order its rotary kernel wants; that permutation is undone here. The format is described in ggml's
docs/gguf.md; the tokenizer is rebuilt by transformers, with the split of digits that some vocabularies need.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
from torch import Tensor

from upslope.errors import ModelError
from upslope.models.decoder.network import Decoder, DecoderConfig, rope_frequencies
from upslope.models.files.config_json import check_config, check_sizes, one_model_error
from upslope.models.files.folders import write_json
from upslope.models.files.weights import check_shapes, save_folder

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_SPECIALS = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
_ROPE_FACTORS = "rope_freqs.weight"
_ENDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))  # of a text, a turn, a message

# How a byte-level vocabulary cuts text before merging (llama.cpp's names). The first group cuts every digit off
# first, as its tokenizers were trained; transformers' conversion omits that. The second group it converts itself.
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_KNOWN_SPLITS = frozenset(
    {"gpt-2", "default", "qwen2", "deepseek-r1-qwen", "llama-bpe", "llama3", "llama-v3", "tekken"}
)


def convert(
    gguf_file: Path | str,
    folder: Path | str,
    *,
    provenance: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda message: None,
    overwrite: bool = False,
) -> Path:
    """Write `folder` (float32 weights, config, tokenizer, chat template, generation config) from a GGUF file.

    `provenance` is stored as upslope_source.json. Atomic (models.files.weights.save_folder). Raises ModelError for a
    damaged file, and for architectures, rotary scalings and tensors that would not survive the conversion.
    """
    path = Path(gguf_file)
    with one_model_error(f"{path}: cannot be converted, damaged or made wrongly"):
        reader = _open(path)
        metadata = _metadata(reader)
        config = hf_config(metadata, {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}, where=path)
        say(f"{path.name}: de-quantising {len(reader.tensors)} tensors")
        tensors = _tensors(reader, DecoderConfig.from_hf(config), config["model_type"], path)
        if (factors := tensors.pop(_ROPE_FACTORS, None)) is not None:
            config["rope_parameters"] |= _llama3_scaling(factors, config, path)
        network = DecoderConfig.from_hf(config)
        check_shapes(expected_shapes(network), {name: t.shape for name, t in tensors.items()}, where=path)
        say(f"{path.name}: converting the tokenizer")
        tokenizer = _tokenizer(path, metadata, config)
        return save_folder(
            folder,
            network.to_hf(),
            tensors,
            tokenizer=_Portable(tokenizer),
            generation_config=_generation_config(metadata, tokenizer),
            record=provenance or {},
            overwrite=overwrite,
        )


def gguf_names(config: DecoderConfig, architecture: str) -> dict[str, str]:
    """GGUF's name of every tensor of the network, by Hugging Face's.

    model.layers.3.self_attn.q_proj.weight is blk.3.attn_q.weight. ModelError for one that llama.cpp's graph lacks.
    """
    known = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    names = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in expected_shapes(config)}
    if missing := [name for name, found in names.items() if found is None]:
        raise ModelError(f"{missing[0]}: llama.cpp has no such tensor in this architecture")
    return {name: str(found) for name, found in names.items()}


def rotary_heads(config: DecoderConfig, architecture: str, name: str) -> int | None:
    """The heads of a query or key projection whose rows llama.cpp keeps in another order; None for other tensors."""
    if architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return None
    return config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads


def undo_rope_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a llama query or key projection, [heads * d, ...]: pairs (2i, 2i+1) back to halves (i, i + d/2)."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def hf_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: Path | str = "GGUF"
) -> dict[str, Any]:
    """config.json for a file with these metadata; `shapes` are GGUF's (fastest dimension first)."""
    if (kind := metadata.get("general.architecture")) not in ARCHITECTURES:
        raise ModelError(f"{where}: GGUF architecture {kind!r} is not supported, only {', '.join(ARCHITECTURES)}")

    def key(name: str, default: Any = None) -> Any:
        if (value := metadata.get(f"{kind}.{name}", default)) is None:
            raise ModelError(f"{where}: GGUF metadata lacks {kind}.{name}; get the file again")
        if type(value) not in (int, float) or not value > 0:
            raise ModelError(f"{where}: GGUF metadata {kind}.{name} = {value!r:.60}; it must be a number above 0")
        return value

    if (scaling := metadata.get(f"{kind}.rope.scaling.type", "none")) != "none":
        raise ModelError(f"{where}: rotary scaling {scaling!r} is not supported in a GGUF; use the model's own folder")
    hidden, heads = key("embedding_length"), key("attention.head_count")
    head_dim = key("attention.key_length", hidden // heads)
    if key("rope.dimension_count", head_dim) != head_dim or key("attention.value_length", head_dim) != head_dim:
        raise ModelError(f"{where}: partial rotary positions or unequal key and value widths are not supported")
    kv_heads = key("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise ModelError(f"{where}: {heads} query heads cannot share {kv_heads} key heads evenly; get the file again")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{where}: 1 missing (token_embd.weight); get the file again")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": shapes["token_embd.weight"][-1],
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": _shortest_float32(key("attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": _shortest_float32(key("rope.freq_base", 10000.0))},
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if kind != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    tokens = {f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in _SPECIALS}
    config |= {name: token for name, token in tokens.items() if token is not None}
    check_config(config, where)
    check_sizes(config, shapes, where)
    return config


def _shortest_float32(value: float) -> float:
    """The short decimal a float32 came from: 9.999999747378752e-06 -> 1e-05."""
    return float(str(np.float32(value)))


def read_ends(gguf_file: Path | str) -> list[int]:
    """The tokens at which a GGUF file's own entries end generation, each once."""
    return _ends(_metadata(_open(Path(gguf_file))))


def _ends(metadata: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(metadata[key] for key in _ENDS if metadata.get(key) is not None))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"{path}: no such GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file")
    with one_model_error(f"{path}: damaged or cut short; get it again"):
        return GGUFReader(str(path))


def _metadata(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _tensors(reader: Any, config: DecoderConfig, architecture: str, path: Path) -> dict[str, Tensor]:
    """De-quantised float32 tensors by their Hugging Face names; rotary factors keep their own name."""
    names = {stored: name for name, stored in gguf_names(config, architecture).items()} | {_ROPE_FACTORS: _ROPE_FACTORS}
    if unknown := [t.name for t in reader.tensors if t.name not in names]:
        raise ModelError(f"{path}: {len(unknown)} tensors of an unsupported network ({', '.join(unknown[:4])})")
    result: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(f"{path}: {tensor.name} has an unsupported quantisation ({error})") from error
        name, weight = names[tensor.name], torch.from_numpy(values.copy())
        heads = rotary_heads(config, architecture, name)
        result[name] = weight if heads is None else undo_rope_order(weight, heads)
    return result


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the network's tensors."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in Decoder(config).state_dict().items()}


def _llama3_scaling(factors: Tensor, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Llama 3's rotary scaling, recognised by the per-pair divisors that llama.cpp stores instead of the rule."""
    rule = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = config["rope_parameters"]
    divisors = rope_frequencies(plain, config["head_dim"]) / rope_frequencies(plain | rule, config["head_dim"])
    if factors.shape != divisors.shape or not torch.allclose(factors.double(), divisors, rtol=1e-4):
        raise ModelError(f"{path}: {_ROPE_FACTORS} is not Llama 3's rotary scaling; use the model's own folder")
    return rule


def _tokenizer(path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The file's tokenizer and chat template as a transformers tokenizer that saves as tokenizer.json."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    split = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and split not in _DIGIT_SPLITS | _KNOWN_SPLITS:
        raise ModelError(f"{path}: the tokenizer's pre-split {split!r} is unknown; tokens would be silently wrong")
    with tempfile.TemporaryDirectory() as alone:
        # Alone in a folder, so that no config or tokenizer file beside the GGUF is taken for its own.
        try:
            os.symlink(path.resolve(), Path(alone, path.name))
        except OSError:
            shutil.copyfile(path, Path(alone, path.name))
        with one_model_error(f"{path}: the tokenizer cannot be converted"):
            rebuilt = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    if byte_level and split in _DIGIT_SPLITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        rebuilt.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    framed = metadata.get("tokenizer.ggml.add_bos_token", True)
    has_bos = framed or metadata.get("tokenizer.ggml.bos_token_id") is not None  # transformers then names some token
    return PreTrainedTokenizerFast(
        tokenizer_object=rebuilt.backend_tokenizer,
        bos_token=rebuilt.bos_token if has_bos else None,
        **{name: getattr(rebuilt, name) for name in ("eos_token", "unk_token", "pad_token", "chat_template")},
        model_max_length=config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


class _Portable:
    """A tokenizer that saves under the class name every transformers version knows, without this machine's flags."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def save_pretrained(self, save_directory: str) -> None:
        self.tokenizer.save_pretrained(save_directory)
        path = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only", "backend")}
        write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _generation_config(metadata: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The ends that the file names, BOS and padding. What closes the chat template's turns data.chat finds in it."""
    ids = _ends(metadata)
    config = {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    config |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {name: value for name, value in config.items() if value is not None}
