"""Models whose chat template closes a turn with one token while the tokenizer's EOS is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_kit import byte_level, decoder_folder
from tiny_model import CHATML

EOS, OPEN, END = "<|endoftext|>", "<|im_start|>", "<|end|>"
PLAIN = CHATML.replace("<|im_end|>", END)


def tokenizer_ending(template: str | None = PLAIN, *more: str) -> Any:
    """Bytes and a few merges; EOS <|endoftext|>, special tokens <|im_start|>, <|im_end|>, <|end|> and `more`."""
    tokenizer = byte_level()
    tokenizer.eos_token = tokenizer.pad_token = EOS
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, "<|im_end|>", END, *more]})
    tokenizer.chat_template = template
    return tokenizer


def folder_ending(path: Path, template: str | None = PLAIN, *more: str, **shape: Any) -> Path:
    """A tiny random decoder with that tokenizer; its generation_config.json knows the EOS alone."""
    return decoder_folder(path, tokenizer_ending(template, *more), **shape)
