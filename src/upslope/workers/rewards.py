"""Rewards in processes that can be killed: a reward that hangs, dies or raises costs its own sample and nothing else.

A job is one prompt's group. If its worker hangs or dies, the group's samples are retried one by one, so that only the
guilty one becomes an error.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from upslope.errors import ConfigError, DataError
from upslope.plugins import TIMED_OUT, first_line
from upslope.rewards.judge import InlineJudge, Judge, WeightedSum
from upslope.rewards.summands import (
    RewardSpecs,
    Sample,
    Summand,
    Surroundings,
    load_networks,
    parse_rewards,
    split_rewards,
)
from upslope.tasks.base import Task, load_task
from upslope.types import Prompt, Reward, Rollout, RolloutGroup
from upslope.workers.pool import Pool


@dataclass(frozen=True, slots=True)
class _Group:
    """Rollouts of one prompt to be judged by one call, and where what is said of them goes."""

    prompt: Prompt
    rollouts: list[Rollout]
    judged: list[tuple[Rollout, Reward]]

    def message(self) -> bytes:
        try:
            return pickle.dumps((self.prompt, [Sample.of(rollout) for rollout in self.rollouts]))
        except Exception as error:
            raise DataError(
                f"prompt {self.prompt.key} cannot be sent to a reward worker ({type(error).__name__}: "
                f"{first_line(error)}); keep plain values in its metadata"
            ) from error

    def answered(self, answer: Mapping[str, Any]) -> bool:
        for rollout, fields in zip(self.rollouts, answer["rewards"], strict=True):
            steps = [(at, step) for at, step in fields.pop("steps")]
            self.judged.append((rollout, Reward(**fields, steps=steps)))
        return any(TIMED_OUT in (fields["error"] or "") for fields in answer["rewards"])

    def failed(self, reason: str, seconds: float) -> None:
        self.judged.extend((rollout, Reward(value=None, error=reason, seconds=seconds)) for rollout in self.rollouts)

    def parts(self, ready: Mapping[str, Any]) -> list[_Group]:
        single = len(self.rollouts) == 1 or ready["whole_group"]
        return [] if single else [replace(self, rollouts=[rollout]) for rollout in self.rollouts]


class RewardPool(Pool, Judge):
    """Judges groups in `processes` killable worker processes.

    task: the spec of the task (`load_task`). rewards: (spec, weight) pairs or texts such as "length:target=20@0.5"
    that replace the task's own reward; "task" among them stands for it. timeout_s: wall-clock limit of one job (a
    group, or one sample on retry), start-up not counted. networks: what is added in this process.

    Use it as a context manager, or call `close`. Workers start at once, in the background. ConfigError, raised by
    the first `judge`: a worker cannot load the task or a reward. RunError: workers die while starting, or are closed.
    """

    def __init__(
        self,
        task: str | None,
        rewards: RewardSpecs = (),
        *,
        processes: int = 1,
        timeout_s: float = 10.0,
        networks: Sequence[Summand] = (),
    ) -> None:
        setup = {"task": task, "rewards": parse_rewards(rewards)}
        super().__init__("upslope.workers.rewards:start", setup, processes=processes, timeout_s=timeout_s)
        self.networks = networks

    def fill(self, groups: Sequence[RolloutGroup]) -> None:
        """Set every rollout's reward by the functions, once all are judged."""
        judged: list[tuple[Rollout, Reward]] = []
        self.run([_Group(group.prompt, group.rollouts, judged) for group in groups if group.rollouts])
        for rollout, reward in judged:
            rollout.reward = reward


def start(setup: Mapping[str, Any]) -> tuple[Callable[[Prompt, list[Sample]], dict[str, Any]], dict[str, Any]]:
    """In the worker: what answers a job, and what the trainer has to know before the first one."""
    task = None if setup["task"] is None else load_task(setup["task"])
    total = WeightedSum(task, [(spec, weight) for spec, weight in setup["rewards"]])

    def judge(prompt: Prompt, samples: list[Sample]) -> dict[str, Any]:
        rewards = total.judge(prompt, samples, timeout_s=setup["timeout_s"])
        return {"rewards": [asdict(reward) for reward in rewards]}

    return judge, {"whole_group": total.whole_group}


def make_scorer(
    task: Task | str | None,
    rewards: RewardSpecs = (),
    *,
    processes: int = 0,
    timeout_s: float = 10.0,
    surroundings: Surroundings | None = None,
) -> Judge:
    """The judge a recipe uses: in this process where processes is 0 and every part is safe there, else a pool.

    A task made by hand and rewards that are functions are used in this process, without a time limit.

    Rewards that are networks (NETWORKS) are added in this process; they need the policy's `surroundings`.
    """
    plain, specs = split_rewards(rewards)
    if specs and surroundings is None:
        raise ConfigError(f"reward '{specs[0][0]}' is a network and needs a policy to read its tokens from")
    networks = load_networks(specs, surroundings) if surroundings is not None else []
    if networks and not plain:
        return InlineJudge(None, networks)
    objects = [spec for spec, _ in plain if not isinstance(spec, str)]
    objects += [task] if isinstance(task, Task) and task.spec is None else []
    if processes == 0:
        total = WeightedSum(load_task(task) if isinstance(task, str) else task, plain)
        if objects or total.inline_safe:
            return InlineJudge(total, networks)
    if objects:
        raise ConfigError(f"{objects[0]!r:.80} is an object of this process, where a reward worker has none: name it")
    spec = task.spec if isinstance(task, Task) else task
    return RewardPool(spec, plain, processes=max(1, processes), timeout_s=timeout_s, networks=networks)
