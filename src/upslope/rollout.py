"""Prompts x engine x judge -> judged groups of rollouts, in (prompt, sample) order whatever finished first."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from upslope.data.chat import encode_prompt
from upslope.data.template import Tools
from upslope.rewards.judge import Judge
from upslope.tasks.base import KEY_BITS
from upslope.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams


class Generator(Protocol):
    """What decodes: the engine in this process, or anything that answers like it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, keys: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """One list of `params.n` completions per prompt."""
        ...


def collect(
    engine: Generator, tokenizer: Any, judge: Judge, prompts: Sequence[Prompt], params: SamplingParams
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Sample `params.n` completions of each prompt and judge them."""
    groups = sample(engine, tokenizer, prompts, params)
    return groups, judge.judge(groups)


def sample(
    engine: Generator, tokenizer: Any, prompts: Sequence[Prompt], params: SamplingParams, tools: Sequence[Tools] = ()
) -> list[RolloutGroup]:
    """`params.n` completions of each prompt, not judged; they depend on (seed, prompt, sample) only.

    tools: what each prompt offers, where one does.
    """
    offered = tools or [()] * len(prompts)
    encoded = [encode_prompt(tokenizer, prompt, tools=own) for prompt, own in zip(prompts, offered, strict=True)]
    completions = engine.generate(encoded, params, keys=sampling_keys(prompts))
    return [
        RolloutGroup(prompt, [Rollout.from_completion(tokens, c, i) for i, c in enumerate(samples)])
        for prompt, tokens, samples in zip(prompts, encoded, completions, strict=True)
    ]


def sampling_keys(prompts: Sequence[Prompt]) -> list[int]:
    """What seeds each prompt's sampling: its key, and how often it has occurred before it in the same call.

    Without the second, a prompt given twice (a batch larger than the data) would draw the same completions twice.
    """
    seen: Counter[int] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(prompt.key + (seen[prompt.key] << KEY_BITS))
        seen[prompt.key] += 1
    return keys


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How long the completions are, and the share that was cut."""
    return {
        "completions/mean_length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "completions/clipped_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
