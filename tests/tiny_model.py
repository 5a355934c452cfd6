"""A tiny random model folder with a byte-level tokenizer and a ChatML template, for tests of whole recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.weights import save_folder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the two ChatML marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|im_start|>": 0, "<|im_end|>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def tiny_config(**changes: Any) -> DecoderConfig:
    """Two layers, width 32, four query heads over two key heads."""
    shape: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return DecoderConfig(**{**shape, **changes})


def tiny_folder(path: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write the folder and return it."""
    torch.manual_seed(seed)
    model = Decoder(tiny_config(**changes))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_folder(path, model.config.to_hf(), tensors, tokenizer=tiny_tokenizer(), generation_config={"eos_token_id": 1})
    return path
