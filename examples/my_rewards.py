"""Rewards of your own: functions of (prompts, completions) that return one judgement per completion.

    upslope grpo --task sentiment --reward examples/my_rewards.py:few_exclamations
    upslope grpo --task sentiment --reward task --reward examples/my_rewards.py:sentences:wanted=2@0.5

A judgement is a number, a dict of named summands, a Reward, or None (no verdict: the sample is left out).
"""

from __future__ import annotations

import asyncio

from upslope.types import Prompt


def few_exclamations(prompts: list[Prompt], completions: list[str]) -> list[float]:
    """0 without exclamation marks, down to -1 at ten of them."""
    return [-min(completion.count("!"), 10) / 10 for completion in completions]


def sentences(
    prompts: list[Prompt], completions: list[str], *, finish_reasons: list[str], wanted: int = 1
) -> list[dict[str, float]]:
    """Named summands, a parameter (`wanted`), and a list that the judge fills in because it is asked for by name."""
    counts = [sum(completion.count(mark) for mark in ".!?") for completion in completions]
    return [
        {"count": float(count == wanted), "finished": 0.5 * (reason == "stop")}
        for count, reason in zip(counts, finish_reasons, strict=True)
    ]


async def ask_elsewhere(prompts: list[Prompt], completions: list[str]) -> list[float]:
    """An async reward is called once per sample, all samples of a prompt at the same time.

    Here would stand a request to a judge's server; waiting for one costs the others nothing.
    """
    await asyncio.sleep(0.01)
    return [float("please" in completion.lower()) for completion in completions]
