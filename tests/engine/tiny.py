"""Small random decoders, a byte tokenizer, and the trainer's log-probs to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.types import Completion

SHAPES = {
    "grouped": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 48},
    "full heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 40},
    "biased": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_size": 100,
        "attention_bias": True,
        "model_type": "qwen2",
    },
    "normed": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_size": 72,
        "qk_norm": True,
        "model_type": "qwen3",
    },
}


def tiny(
    shape: str = "grouped",
    dtype: torch.dtype = torch.float32,
    *,
    vocab: int = 97,
    context: int = 512,
    tie_word_embeddings: bool = True,
) -> Decoder:
    """A two-layer decoder whose distributions are far from uniform."""
    torch.manual_seed(7)
    config = DecoderConfig(
        vocab_size=vocab,
        intermediate_size=67,
        num_hidden_layers=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        tie_word_embeddings=tie_word_embeddings,
        **SHAPES[shape],
    )
    return Decoder(config).to(dtype)


def prompt(length: int, seed: int = 0, vocab: int = 97) -> list[int]:
    """Random tokens, none of them 0."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(1, vocab, (length,), generator=generator).tolist()


def trainer_logprobs(
    model: Decoder, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probs of the tokens after each prompt as training computes them: one packed forward, chunked head."""
    lengths = [len(p) + len(c) for p, c in sequences]
    tokens = torch.tensor([t for p, c in sequences for t in p + c])
    rows, offset = [], 0
    for (p, _), length in zip(sequences, lengths, strict=True):
        rows += range(offset + len(p) - 1, offset + length - 1)
        offset += length
    targets = torch.tensor([t for _, c in sequences for t in c])
    with torch.no_grad():
        hidden = model(tokens, PackedContext(lengths))[torch.tensor(rows)]
        logp = linear_token_logprobs(hidden, model.head_weight, targets, temperature=temperature).tolist()
    result = []
    for _, c in sequences:
        result.append(logp[: len(c)])
        logp = logp[len(c) :]
    return result


def assert_exact(
    model: Decoder, prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> None:
    """The engine's policy log-probs are the trainer's, bit for bit, packed together and one by one."""
    pairs = [(p, c.tokens) for p, group in zip(prompts, groups, strict=True) for c in group]
    sampled = [c.policy_logprobs for group in groups for c in group]
    assert trainer_logprobs(model, pairs, temperature) == sampled
    assert [trainer_logprobs(model, [pair], temperature)[0] for pair in pairs] == sampled


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i - 1; 0 is the special end of sequence."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    by_byte = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    rest = [b for b in range(256) if b not in by_byte.values()]
    by_byte.update({chr(256 + i): b for i, b in enumerate(rest)})
    vocab = {"<eos>": 0, **{c: by_byte[c] + 1 for c in alphabet}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def ids(text: str) -> list[int]:
    """The byte tokenizer's ids."""
    return [b + 1 for b in text.encode()]
