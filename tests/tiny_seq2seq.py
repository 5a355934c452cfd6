"""Small random encoder-decoders, their prompts, and the trainer's log-probs to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from upslope.data.batching import collate
from upslope.models.seq2seq.layers import Seq2SeqConfig
from upslope.models.seq2seq.network import Seq2Seq
from upslope.training.step import Forward, score
from upslope.types import Completion, Example

PAD, EOS = 0, 1

SHAPES: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm": "pre", "num_attention_heads": 3, "hidden_size": 42},
    "separate": {"source_vocab_size": 53, "num_attention_heads": 2, "hidden_size": 48, "encoder_layers": 1},
}


def tiny_config(**changes: Any) -> Seq2SeqConfig:
    """Two layers a side, width 32, four heads of 8, 97 tokens of which 0 begins a target and 1 ends one."""
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 52,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
    }
    return Seq2SeqConfig(**{**shape, **changes})


def tiny(shape: str = "post", dtype: torch.dtype = torch.float32, *, seed: int = 7, **changes: Any) -> Seq2Seq:
    """A network whose distributions are far from uniform and whose biases and norms are not at their start."""
    torch.manual_seed(seed)
    model = Seq2Seq(tiny_config(**{**SHAPES[shape], **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            elif "embed" in name or "shared" in name:
                p.mul_(2.0)
    return model.to(dtype)


def prompt(model: Seq2Seq, length: int, seed: int = 0) -> list[int]:
    """A random source of `length` tokens, then decoder_start."""
    config = model.config
    generator = torch.Generator().manual_seed(1000 * seed + length)
    size = config.source_vocab_size or config.vocab_size
    ids = torch.randint(2, size, (length,), generator=generator) + config.source_offset
    return [*ids.tolist(), config.decoder_start_token_id]


def trainer_logprobs(
    model: Seq2Seq,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    share_prompts: bool = False,
    temperature: float = 1.0,
) -> list[list[float]]:
    """Log-probs of the tokens after each prompt, by the trainer's own scoring of one packed batch."""
    examples = [Example(p + c, [False] * len(p) + [True] * len(c)) for p, c in pairs]
    logp = score(model, [collate(examples, share_prompts=share_prompts)], Forward(temperature=temperature)).logp_N
    assert logp is not None
    return [part.tolist() for part in logp.split([len(c) for _, c in pairs])]


def assert_exact(
    model: Seq2Seq, prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> None:
    """The engine's policy log-probs are the trainer's, bit for bit: packed, with shared prompts, and one by one."""
    pairs = [(p, c.tokens) for p, group in zip(prompts, groups, strict=True) for c in group]
    sampled = [c.policy_logprobs for group in groups for c in group]
    for shared in (False, True):
        assert trainer_logprobs(model, pairs, share_prompts=shared, temperature=temperature) == sampled
    assert [trainer_logprobs(model, [pair], temperature=temperature)[0] for pair in pairs] == sampled
