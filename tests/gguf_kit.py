"""Tokenizers and tiny decoders for tests of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_model import CHATML, tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.models.decoder.network import Decoder
from upslope.models.files.weights import save_folder

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
MERGED = ("he", "in", "er", "th", "an", "the", "ing", "an ", " is", "    ", "12")
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_regex(pattern: str) -> Any:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_alone])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False),
    "qwen2": (by_regex(rf"{LETTERS}|\p{{N}}|{REST}"), False),
    "llama-bpe": (by_regex(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), True),
    "dbrx": (by_regex(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), False),
    "tekken": (by_regex(TEKKEN), True),
}


def byte_level(split: str = "smollm", *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and a few merges, cut in llama.cpp's way `split`; with `bos` a BOS before every text."""
    cut, whole = SPLITS[split]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*SPECIALS, *alphabet])}
    merges = _merges([word.replace(" ", "\u0120") for word in MERGED], vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    inner.pre_tokenizer, inner.decoder = cut, decoders.ByteLevel()
    return _dressed(inner, bos)


def sentencepiece(*, prefix: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE: letters, a mark for the space, bytes for the rest."""
    specials = ["<unk>", *SPECIALS]
    vocab = {text: i for i, text in enumerate([*specials, *(f"<0x{b:02X}>" for b in range(256))])}
    for letter in "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?+=":
        vocab[letter] = len(vocab)
    merges = _merges([word.replace(" ", "\u2581") for word in MERGED], vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "\u2581")
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _dressed(inner, bos, unk_token="<unk>")


def lacking(tokenizer: PreTrainedTokenizerFast, name: str, start: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer without the special token `name`, its template writing all of them and asking for the BOS."""
    setattr(tokenizer, name, None)
    names = "[{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}{% if bos_token %} starts{% endif %}]"
    tokenizer.chat_template = start + names + CHATML
    return tokenizer


def _merges(words: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """For each word the merge of its longest known beginning with the rest, letter by letter."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return merges


def _dressed(inner: Tokenizer, bos: bool, **more: Any) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        **more,
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        first = ("<|endoftext|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B", special_tokens=[first]
        )
    return tokenizer


@torch.no_grad()
def decoder_folder(path: Path, tokenizer: Any = None, *, seed: int = 0, **changes: Any) -> Path:
    """A tiny decoder whose every parameter matters, norms and biases too, width 64, with a tokenizer of its own."""
    tokenizer = tokenizer or byte_level()
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **changes}
    model = Decoder(tiny_config(**sizes))
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2)
        if name.endswith("norm.weight"):
            parameter.add_(1.0)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    ends = {"eos_token_id": tokenizer.eos_token_id}
    return save_folder(path, model.config.to_hf(), tensors, tokenizer=tokenizer, generation_config=ends)
