"""Judged rollouts: every rollout gets its Reward in place, in (prompt, sample) order whatever finished first.

A reward is a weighted sum. The same code sums in the trainer's own process (`InlineJudge`), in processes that can be
killed (`RewardPool`, workers/rewards.py), and where networks are added to either: they have no place in a worker, a
fresh interpreter without torch, and are asked in the trainer's process, on the policy's device, over whole packed
steps. Free of torch.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upslope.errors import ConfigError, DataError, one_line
from upslope.plugins import TIMED_OUT, ending_forks, first_line
from upslope.rewards.summands import FILLED, RewardSpecs, Sample, Summand, load_summands
from upslope.types import Prompt, Reward, RolloutGroup, storable

if TYPE_CHECKING:
    from upslope.tasks.base import Task

FLOAT32_MAX = 3.4028234663852886e38


class Judge(AbstractContextManager[Any]):
    """What fills in rewards: a subclass those of functions; `networks` are added to them."""

    networks: Sequence[Summand] = ()

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set every rollout's reward, in place; returns `reward/errors`, `reward/timeouts`, `reward/seconds`.

        DataError: a reward gave the wrong number of judgements or no list, or no rollout at all could be judged.
        """
        start = time.perf_counter()
        self.fill(groups)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if self.networks:
            asked = time.perf_counter()
            columns = [_checked(network, network.function(groups), len(rollouts)) for network in self.networks]
            seconds = (time.perf_counter() - asked) / max(1, len(rollouts))
            for rollout, row in zip(rollouts, zip(*columns, strict=True), strict=True):
                before = replace(rollout.reward, seconds=rollout.reward.seconds + seconds)
                rollout.reward = summed(self.networks, row, before)
        rewards = [rollout.reward for rollout in rollouts]
        errors = [reward.error or "not judged" for reward in rewards if reward.value is None]
        if rewards and len(errors) == len(rewards):  # then there is nothing to learn from
            first = f"the first: {errors[0]}"
            raise DataError(f"no reward could be computed for any of {len(rewards)} completions; {first}")
        return {
            "reward/errors": float(len(errors)),
            "reward/timeouts": float(sum(TIMED_OUT in error for error in errors)),
            "reward/seconds": time.perf_counter() - start,
        }

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


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over the judged rollouts, under the field's names.

    `reward`, `reward_std` (population), `frac_reward_zero_std` (groups of two or more judged rollouts that are all
    equal), `rewards/NAME/mean` for every named part, and `accuracy` where verdicts were given.
    """
    judged = [[r.reward for r in group.rollouts if r.reward.value is not None] for group in groups]
    rewards = [reward for group in judged for reward in group]
    if not rewards:
        return {}
    values = [reward.value or 0.0 for reward in rewards]
    mean = sum(values) / len(values)
    metrics = {"reward": mean, "reward_std": (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5}
    wide = [group for group in judged if len(group) > 1]
    if wide:
        equal = sum(len({reward.value for reward in group}) == 1 for group in wide)
        metrics["frac_reward_zero_std"] = equal / len(wide)
    verdicts = [reward.correct for reward in rewards if reward.correct is not None]
    if verdicts:
        metrics["accuracy"] = sum(verdicts) / len(verdicts)
    for name in dict.fromkeys(name for reward in rewards for name in reward.parts):
        parts = [reward.parts[name] for reward in rewards if name in reward.parts]
        metrics[f"rewards/{name}/mean"] = sum(parts) / len(parts)
    return metrics


class WeightedSum:
    """What judges the completions of one prompt, networks aside: the task's reward, or what replaces it.

    Raises ConfigError: see `load_summands`.
    """

    def __init__(self, task: Task | None, rewards: RewardSpecs = ()) -> None:
        self.summands = load_summands(task, rewards)
        self.whole_group = any(summand.whole_group for summand in self.summands)
        self.inline_safe = all(summand.inline_safe for summand in self.summands)

    def judge(self, prompt: Prompt, samples: Sequence[Sample], *, timeout_s: float | None = None) -> list[Reward]:
        """One Reward per sample, in order.

        A sample that cannot be judged gets value None and a one-line error. DataError: a function returned the
        wrong number of judgements or no list at all, which is a mistake in the function and not in a sample.
        """
        start = time.perf_counter()
        if any(summand.is_async for summand in self.summands):
            columns = _run(_judge_all(self.summands, prompt, samples, timeout_s))
        else:
            columns = [_call_sync(summand, prompt, samples) for summand in self.summands]
        rewards = [summed(self.summands, row) for row in zip(*columns, strict=True)]
        seconds = (time.perf_counter() - start) / max(1, len(samples))
        return [replace(reward, seconds=seconds) for reward in rewards]


def summed(summands: Sequence[Summand], rewards: Sequence[Reward], before: Reward | None = None) -> Reward:
    """`before` and the weighted rewards, in order; parts are named and unweighted.

    The verdict is the task's, else the first there is. One error makes the whole sample an error.
    """
    before = before or Reward(value=0.0)
    total = replace(before, parts=dict(before.parts), steps=list(before.steps))
    if total.value is None:
        total.error = total.error or "not judged"
    for summand, reward in zip(summands, rewards, strict=True):
        total.parts.update(_named_parts(summand, reward))
        if total.correct is None or summand.is_task:
            total.correct = total.correct if reward.correct is None else reward.correct
        if reward.value is None:
            total.error = total.error or reward.error
        else:
            total.value = (total.value or 0.0) + summand.weight * reward.value
            total.steps += [(index, summand.weight * step) for index, step in reward.steps]
    return _settled(total)


def _settled(reward: Reward) -> Reward:
    """A judgement as a run can learn from it and keep it: no number beyond float32, texts that are UTF-8."""
    numbers = (reward.value or 0.0, *(step for _, step in reward.steps))
    beyond = next((number for number in numbers if abs(number) > FLOAT32_MAX), None)
    parts = {storable(name): part for name, part in reward.parts.items()}
    error = reward.error
    if error is None and not math.isfinite(reward.value or 0.0):
        error = "the weighted sum of the rewards is not finite"
    elif error is None and beyond is not None:
        error = f"reward {beyond:g} is beyond what float32 holds"
    if error is not None:
        return Reward(value=None, parts=parts, error=storable(error), seconds=reward.seconds)
    return replace(reward, parts=parts)


def _named_parts(summand: Summand, reward: Reward) -> dict[str, float]:
    if reward.value is None:
        return {}
    if not reward.parts:
        return {summand.name: reward.value}
    prefix = "" if summand.is_task else f"{summand.name}/"
    return {f"{prefix}{key}": part for key, part in reward.parts.items()}


async def _judge_all(
    summands: Sequence[Summand], prompt: Prompt, samples: Sequence[Sample], timeout_s: float | None
) -> list[list[Reward]]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiting = [
        asyncio.ensure_future(_call_async(summand, prompt, samples, deadline)) if summand.is_async else None
        for summand in summands
    ]
    try:
        return [
            _call_sync(summand, prompt, samples) if future is None else await future
            for summand, future in zip(summands, waiting, strict=True)
        ]
    finally:
        for future in filter(None, waiting):
            future.cancel()


async def _call_async(
    summand: Summand, prompt: Prompt, samples: Sequence[Sample], deadline: float | None
) -> list[Reward]:
    """One call per sample, all at once, so that one slow or failing sample costs no other its reward."""
    calls = [samples] if summand.whole_group else [[sample] for sample in samples]
    done = await asyncio.gather(*(_await_one(summand, prompt, call, deadline) for call in calls))
    return [reward for rewards in done for reward in rewards]


async def _await_one(
    summand: Summand, prompt: Prompt, samples: Sequence[Sample], deadline: float | None
) -> list[Reward]:
    limit = None if deadline is None else max(0.0, deadline - time.monotonic())
    started = time.monotonic()
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            with ending_forks():
                returned = await _call(summand, prompt, samples)
            return _checked(summand, returned, len(samples))
    except (_WrongReturn, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        late = isinstance(error, TimeoutError) and limit is not None and clock.expired()
        what = f"{TIMED_OUT} after {time.monotonic() - started:.3g} s" if late else _described(error)
        return [Reward(value=None, error=f"{summand.name}: {what}") for _ in samples]


def _call_sync(summand: Summand, prompt: Prompt, samples: Sequence[Sample]) -> list[Reward]:
    """One call for the group; if it raises, one per sample, so that only the guilty one is an error."""
    try:
        return _checked(summand, _call(summand, prompt, samples), len(samples))
    except (_WrongReturn, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        if summand.whole_group or len(samples) == 1:
            return [Reward(value=None, error=f"{summand.name}: {_described(error)}") for _ in samples]
    return [reward for sample in samples for reward in _call_sync(summand, prompt, [sample])]


def _call(summand: Summand, prompt: Prompt, samples: Sequence[Sample]) -> Any:
    """The function's own answer (or its coroutine) for these samples."""
    given = {name: [getattr(sample, FILLED[name]) for sample in samples] for name in summand.extras}
    with ending_forks():
        return summand.function([prompt] * len(samples), [sample.text for sample in samples], **given)


class _WrongReturn(DataError):
    """The function itself is wrong: nothing can be attributed to a sample."""


def _checked(summand: Summand, returned: Any, count: int) -> list[Reward]:
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise _WrongReturn(f"reward '{summand.name}' returned an awaitable; declare it with 'async def'")
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Sequence):
        raise _WrongReturn(
            f"reward '{summand.name}' returned {type(returned).__name__}; "
            f"return a list with one number, dict, Reward or None per completion"
        )
    if len(returned) != count:
        raise _WrongReturn(
            f"reward '{summand.name}' returned {len(returned)} judgements for {count} completions; "
            f"return exactly one per completion, in their order (None where there is no verdict)"
        )
    return [_as_reward(summand, value) for value in returned]


class _Unusable(Exception):
    """What a function said of a sample is no reward."""


def _as_reward(summand: Summand, said: Any) -> Reward:
    try:
        return _read(said)
    except _Unusable as error:
        return Reward(value=None, error=f"{summand.name}: {error}")


def _read(said: Any) -> Reward:
    if said is None:
        raise _Unusable("no verdict (returned None)")
    if isinstance(said, Mapping):
        must = "every part must be a finite number"
        parts = {str(key): _finite(part, f"part '{key}' is {{}}; {must}") for key, part in said.items()}
        return Reward(_finite(sum(parts.values()) if parts else None, f"no parts; {must}"), parts)
    if not isinstance(said, Reward):
        return Reward(_finite(said, "returned {}; a finite number is needed"))
    if said.value is None:
        raise _Unusable(one_line(said.error or "a Reward without a value"))
    what = "a Reward with a value that is not a finite number"
    return Reward(
        value=_finite(said.value, what),
        parts={str(key): _finite(part, what) for key, part in said.parts.items()},
        correct=None if said.correct is None else bool(said.correct),
        steps=[(int(index), _finite(step, what)) for index, step in said.steps],
    )


def _finite(value: Any, otherwise: str) -> float:
    """The number; _Unusable with the message `otherwise`, {} standing for the value, where it is none."""
    is_number = hasattr(value, "__float__") and not isinstance(value, str | bytes | complex)
    if not is_number or not math.isfinite(number := float(value)):
        raise _Unusable(otherwise.replace("{}", _shown(value)))
    return number


def _described(error: BaseException) -> str:
    """An exception on one line: its type, its message, and the line of the function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__]
    where = f" ({own[-1].filename.rsplit('/', 1)[-1]}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(first_line(error))}{where}"


def _shown(value: Any) -> str:
    return one_line(f"{value!r:.60} ({type(value).__name__})" if isinstance(value, str) else repr(value)[:60])


def _run(coroutine: Any) -> Any:
    """Run a coroutine to its end, also where the caller (a server, a notebook) has a running loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
