"""Prompts x engine x judge -> judged groups of rollouts, in (prompt, sample) order whatever finished first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from upslope.data.chat import encode_prompt
from upslope.rollout.judge import Scorer
from upslope.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams

__all__ = ["Generator", "collect"]


class Generator(Protocol):
    """What decodes: the engine in this process, or anything that answers like it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """One list of `params.n` completions per prompt."""
        ...


def collect(
    engine: Generator, tokenizer: Any, judge: Scorer, prompts: Sequence[Prompt], params: SamplingParams
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Sample `params.n` completions of each prompt and judge them."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = engine.generate(encoded, params, keys=[prompt.key for prompt in prompts])
    groups = [
        RolloutGroup(prompt, [Rollout.from_completion(tokens, c, sample) for sample, c in enumerate(samples)])
        for prompt, tokens, samples in zip(prompts, encoded, completions, strict=True)
    ]
    return groups, judge.judge(groups)
