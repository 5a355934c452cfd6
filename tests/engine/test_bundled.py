"""The bundled model: what the engine reports is what the trainer computes, bit for bit, in both dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upslope.data.batching import collate
from upslope.data.chat import encode_prompt, load_tokenizer
from upslope.engine import Engine
from upslope.models.files.loading import load_model
from upslope.training.step import Forward, score
from upslope.types import Example, Message, Prompt, SamplingParams

QUESTIONS = ["What is 2 + 2?", "Name a colour.", "Write one line about the sea, please, and keep it short.", "Hi"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampler_equals_trainer_bit_for_bit(dtype: torch.dtype, smollm2_folder: Path) -> None:
    model, tokenizer = load_model(smollm2_folder, dtype=dtype), load_tokenizer(smollm2_folder)
    prompts = [encode_prompt(tokenizer, Prompt(i, (Message("user", q),))) for i, q in enumerate(QUESTIONS)]
    engine = Engine(model, tokenizer, eos_token_ids=[tokenizer.eos_token_id], num_blocks=24)
    sampled = engine.generate(prompts, SamplingParams(max_tokens=24, n=3, temperature=0.8, seed=1))
    again = engine.generate(prompts[2:3], SamplingParams(max_tokens=24, n=3, temperature=0.8, seed=1), keys=[2])
    assert [c.tokens for c in again[0]] == [c.tokens for c in sampled[2]]

    examples = [
        Example([*p, *c.tokens], [False] * len(p) + [True] * len(c.tokens))
        for p, group in zip(prompts, sampled, strict=True)
        for c in group
    ]
    reported = torch.tensor([x for group in sampled for c in group for x in c.policy_logprobs])
    shared = score(model, [collate(examples, share_prompts=True)], Forward(temperature=0.8)).logp_N
    apart = score(model, [collate([e]) for e in examples[:4]], Forward(temperature=0.8)).logp_N
    assert shared is not None
    assert apart is not None
    assert torch.equal(shared, reported)
    assert torch.equal(apart, reported[: len(apart)])
