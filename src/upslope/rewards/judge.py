"""Judged rollouts: every rollout gets its Reward in place, in (prompt, sample) order whatever finished first.

`InlineJudge` asks functions in this process, `RewardPool` (workers/rewards.py) in processes that can be killed.
Networks have no place in a worker, a fresh interpreter without torch: both ask them here, on the policy's device, over
whole packed steps. Free of torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from upslope.errors import DataError
from upslope.plugins import TIMED_OUT
from upslope.rewards.summands import Sample, Summand
from upslope.rewards.weighted_sum import WeightedSum, add_networks
from upslope.types import Reward, RolloutGroup


class Judge(AbstractContextManager[Any]):
    """What fills in rewards: a subclass those of functions; `networks` are added to them."""

    networks: Sequence[Summand] = ()

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set every rollout's reward, in place; returns `reward/errors`, `reward/timeouts`, `reward/seconds`.

        DataError: a reward gave the wrong number of judgements or no list, or no rollout at all could be judged.
        """
        start = time.perf_counter()
        self.fill(groups)
        if self.networks:
            add_networks(self.networks, groups)
        return _counted(groups, time.perf_counter() - start)

    def fill(self, groups: Sequence[RolloutGroup]) -> None:
        """Set every rollout's reward by the functions, or to 0 where there are none."""
        raise NotImplementedError

    def close(self) -> None:
        """End what judges."""

    def __exit__(self, *_: object) -> None:
        self.close()


class InlineJudge(Judge):
    """Judges in this process: for tasks that are cheap and sure to end. There is no time limit on sync functions.

    total: None where networks alone judge.
    """

    def __init__(self, total: WeightedSum | None, networks: Sequence[Summand] = ()) -> None:
        self._total, self.networks = total, networks

    def fill(self, groups: Sequence[RolloutGroup]) -> None:
        """Set every rollout's reward by the functions, or to 0 where there are none."""
        for group in groups:
            rewards = [Reward(value=0.0) for _ in group.rollouts]
            if self._total is not None:
                rewards = self._total.judge(group.prompt, [Sample.of(rollout) for rollout in group.rollouts])
            for rollout, reward in zip(group.rollouts, rewards, strict=True):
                rollout.reward = reward


def _counted(groups: Sequence[RolloutGroup], seconds: float) -> dict[str, float]:
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
