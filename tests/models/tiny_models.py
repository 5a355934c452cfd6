"""Tiny networks and files for the tests of this room: Hugging Face folders and GGUF files with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WIDE = gguf.GGUFValueType.UINT64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def tiny_network(model_type: str, **changes: Any) -> PreTrainedModel:
    """A transformers network whose every parameter is random and large enough to matter, norms and biases too."""
    config = AutoConfig.for_model(model_type, **{**TINY, **changes})
    return randomise(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def randomise(network: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in network.named_parameters():
        parameter.normal_(std=0.2)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1.0)
    return network.eval()


def write_gguf(path: Path, network: PreTrainedModel, *, split: str = "smollm", **metadata: Any) -> Path:
    """A GGUF of `network` as llama.cpp's converter writes it: its names, float32, q and k rows in rotary order."""
    config = network.config
    kind = config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer, config.vocab_size, split)
    for name, value in metadata.items():
        field = name.replace("__", ".")
        for fields in writer.kv_data:
            fields.pop(field, None)
        writer.add_key_value(field, value, gguf.GGUFValueType.get_type(value) if not _wide(value) else WIDE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if kind == "llama" and ".q_proj." in name:
            array = rotary_order(array, config.num_attention_heads)
        if kind == "llama" and ".k_proj." in name:
            array = rotary_order(array, config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _wide(value: Any) -> bool:
    return type(value) is int and value >= 2**31


def rotary_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + d/2 of each head side by side, row by row as the definition says."""
    d = rows.shape[0] // heads
    order = [head * d + pair + half * (d // 2) for head in range(heads) for pair in range(d // 2) for half in (0, 1)]
    return rows[order]


def _add_tokenizer(writer: gguf.GGUFWriter, size: int, split: str) -> None:
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if chr(c) not in '"#$%&'][: size - len(SPECIAL) - 4]
    tokens = [*SPECIAL, "Ġ", "Ċ", "ĠĠ", "ab", *letters]
    tokens += [f"[PAD{i}]" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (size - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
