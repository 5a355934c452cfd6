"""Judged rollouts: every rollout gets its Reward in place, in (prompt, sample) order whatever finished first.

`InlineScorer` judges in this process, `RewardPool` (workers.py) in processes that can be killed. Both are context
managers with the same `judge`. Free of torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from upslope.errors import DataError
from upslope.tasks.base import Task
from upslope.tasks.scoring import TIMED_OUT, Sample, build_scoring
from upslope.types import Reward, Rollout, RolloutGroup

RewardSpecs = Iterable[str | tuple[str, float]]


class Scorer(Protocol):
    """What fills in rewards."""

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set `rollout.reward` of every rollout; returns counts of errors and timeouts, and seconds."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class InlineScorer:
    """Judges in this process: for tasks that are cheap and sure to end. There is no time limit on sync functions.

    task: a task or its spec; rewards: what replaces its own reward, as for `RewardPool`.
    """

    def __init__(self, task: Task | str | None, rewards: RewardSpecs = ()) -> None:
        self._scoring = build_scoring(task, rewards)

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set every rollout's reward. DataError: a function broke its contract, or no rollout could be judged."""
        start = time.perf_counter()
        for group in groups:
            rewards = self._scoring.judge(group.prompt, [sample_of(rollout) for rollout in group.rollouts])
            for rollout, reward in zip(group.rollouts, rewards, strict=True):
                rollout.reward = reward
        return finish(groups, time.perf_counter() - start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def sample_of(rollout: Rollout) -> Sample:
    """What a reward may see of a rollout."""
    return Sample(rollout.text, sum(rollout.mask), rollout.finish_reason)


def finish(groups: Sequence[RolloutGroup], seconds: float) -> dict[str, float]:
    """Count errors and timeouts. DataError when not one rollout was judged: then there is nothing to learn from."""
    rewards = [rollout.reward for group in groups for rollout in group.rollouts]
    errors = [reward.error or "not judged" for reward in rewards if reward.value is None]
    if rewards and len(errors) == len(rewards):
        raise DataError(f"no reward could be computed for any of {len(rewards)} completions; the first: {errors[0]}")
    return {
        "reward/errors": float(len(errors)),
        "reward/timeouts": float(sum(TIMED_OUT in error for error in errors)),
        "reward/seconds": seconds,
    }


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over the judged rollouts, under the field's names.

    `reward`, `reward_std` (population), `frac_reward_zero_std` (groups of two or more judged rollouts that are all
    equal), `rewards/NAME/mean` for every named part, and `accuracy` where verdicts were given.
    """
    judged = [[r.reward for r in group.rollouts if r.reward.value is not None] for group in groups]
    rewards = [reward for group in judged for reward in group]
    if not rewards:
        return {}
    values = [_value(reward) for reward in rewards]
    mean = sum(values) / len(values)
    metrics = {"reward": mean, "reward_std": (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5}
    wide = [group for group in judged if len(group) > 1]
    if wide:
        equal = sum(min(map(_value, group)) == max(map(_value, group)) for group in wide)
        metrics["frac_reward_zero_std"] = equal / len(wide)
    verdicts = [reward.correct for reward in rewards if reward.correct is not None]
    if verdicts:
        metrics["accuracy"] = sum(verdicts) / len(verdicts)
    for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
        parts = [reward.parts[name] for reward in rewards if name in reward.parts]
        metrics[f"rewards/{name}/mean"] = sum(parts) / len(parts)
    return metrics


def _value(reward: Reward) -> float:
    assert reward.value is not None
    return reward.value


def length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How long the completions are, and the share that was cut."""
    return {
        "completions/mean_length": sum(len(r.tokens) for r in rollouts) / len(rollouts),
        "completions/clipped_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
