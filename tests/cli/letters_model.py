"""A tiny random model whose likeliest tokens are always letters, so that what it says greedily can be printed."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder, tiny_tokenizer


def letters_folder(path: Path, *, seed: int = 0, ends: bool = True, **changes: Any) -> Path:
    """Write the folder and return it. Greedy replies end now and then, or never (`ends`)."""
    tiny_folder(path, seed=seed, tie_word_embeddings=False, **changes)
    weights = load_file(path / "model.safetensors")
    tokenizer = tiny_tokenizer()
    letters = [tokenizer.convert_tokens_to_ids(c) for c in string.ascii_letters + string.digits]
    spoken = torch.zeros(len(tokenizer), 1)
    spoken[[*letters, tokenizer.eos_token_id] if ends else letters] = 1.0
    weights["lm_head.weight"] *= spoken  # the others' logits are 0, and the largest of sixty is above that
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
