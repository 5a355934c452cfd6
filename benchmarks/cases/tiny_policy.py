"""A decoder over single letters, small enough for whole experiments, and the supervised start of an experiment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.weights import save_folder
from upslope.options import SFTOptions
from upslope.recipes.sft import sft

EOS = "<eos>"


def letter_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """One token per letter, and the end of sequence (id 0)."""
    vocab = {EOS: 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=EOS)


def letter_model(path: Path, letters: str, *, seed: int, width: int = 64, layers: int = 2) -> Path:
    """A folder with a fresh decoder over `letters`."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=len(letters) + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Decoder(config)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    generation = {"eos_token_id": 0}
    return save_folder(path, config.to_hf(), tensors, tokenizer=letter_tokenizer(letters), generation_config=generation)


def imitate(
    model: Path, pairs: Sequence[tuple[str, str]], folder: Path, *, seed: int, steps: int, batch_size: int = 64
) -> Path:
    """Supervised training on (prompt, completion) pairs; returns the trained folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    summary = sft(
        SFTOptions(
            model=str(model),
            data=str(data),
            output_dir=str(folder / "sft"),
            seed=seed,
            dtype="float32",
            batch_size=batch_size,
            max_steps=steps,
            learning_rate=3e-3,
            warmup_steps=10,
            eval_every=0,
            eval_samples=100,
            save_every=10_000,
        )
    )
    return Path(summary["model"])
