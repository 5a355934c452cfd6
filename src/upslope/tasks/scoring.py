"""One prompt's completions in, one Reward each out: the task's reward and reward functions, weighted and checked.

The same code judges in the trainer's own process and in a worker. Free of torch.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from upslope.errors import ConfigError, DataError, one_line
from upslope.plugins import ending_forks, first_line
from upslope.tasks.base import Task
from upslope.tasks.loading import FILLED, TASK_REWARD, load_reward, load_task, parse_rewards
from upslope.types import Prompt, Reward, storable

TIMED_OUT = "timed out"
FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True, slots=True)
class Sample:
    """What a reward may look at besides the prompt: the text, the tokens sampled, and why sampling ended."""

    text: str
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Component:
    """One summand of the reward: a function, its weight, and how it wants to be called."""

    name: str
    weight: float
    function: Callable[..., Any]
    inline_safe: bool
    whole_group: bool
    is_task: bool = False
    is_async: bool = False
    extras: tuple[str, ...] = ()

    def call(self, prompt: Prompt, samples: Sequence[Sample]) -> Any:
        """The function's own answer (or its coroutine) for these samples."""
        given: dict[str, Any] = {}
        if "num_tokens" in self.extras:
            given["num_tokens"] = [sample.num_tokens for sample in samples]
        if "finish_reasons" in self.extras:
            given["finish_reasons"] = [sample.finish_reason for sample in samples]
        with ending_forks():
            return self.function([prompt] * len(samples), [sample.text for sample in samples], **given)


@dataclass(slots=True)
class Scoring:
    """The weighted sum that judges a completion."""

    components: list[Component]
    task: Task | None = None
    whole_group: bool = field(init=False)
    inline_safe: bool = field(init=False)

    def __post_init__(self) -> None:
        self.whole_group = any(component.whole_group for component in self.components)
        self.inline_safe = all(component.inline_safe for component in self.components)

    def judge(self, prompt: Prompt, samples: Sequence[Sample], *, timeout_s: float | None = None) -> list[Reward]:
        """One Reward per sample, in order.

        A sample that cannot be judged gets value None and a one-line error. DataError: a function returned the
        wrong number of judgements or no list at all, which is a mistake in the function and not in a sample.
        """
        start = time.perf_counter()
        columns = _run(_judge_all(self.components, prompt, samples, timeout_s)) if self._any_async else [
            _call_sync(component, prompt, samples) for component in self.components
        ]  # fmt: skip
        rewards = [_combine(self.components, [column[i] for column in columns]) for i in range(len(samples))]
        seconds = (time.perf_counter() - start) / max(1, len(samples))
        for reward in rewards:
            reward.seconds = seconds
        return rewards

    @property
    def _any_async(self) -> bool:
        return any(component.is_async for component in self.components)


def build_scoring(task: Task | str | None, rewards: Iterable[str | tuple[str, float]] = ()) -> Scoring:
    """The scoring of a task, or of `rewards` in its place ("task" among them is the task's own).

    Raises ConfigError: there is nothing that judges, or a name is unknown.
    """
    loaded = load_task(task) if isinstance(task, str) else task
    pairs = parse_rewards(rewards)
    if not pairs:
        if loaded is None or not loaded.has_reward:
            named = f"task '{loaded.name}' has no reward of its own" if loaded else "no task is given"
            raise ConfigError(f"{named}; name a reward, such as --reward my_rewards.py:fn")
        pairs = [(TASK_REWARD, 1.0)]
    components = [_component(spec, weight, loaded) for spec, weight in pairs]
    return Scoring(_with_unique_names(components), loaded)


def _component(spec: str, weight: float, task: Task | None) -> Component:
    if spec == TASK_REWARD:
        if task is None or not task.has_reward:
            raise ConfigError("the reward 'task' means the task's own, and there is none")
        function, name = task.rewards, task.name
        safe, whole = task.inline_safe, task.whole_group
    else:
        loaded = load_reward(spec)
        function, name = loaded.function, loaded.name
        safe, whole = loaded.inline_safe, loaded.whole_group
    return Component(
        name=name,
        weight=weight,
        function=function,
        inline_safe=safe,
        whole_group=whole,
        is_task=spec == TASK_REWARD,
        is_async=_is_async(function),
        extras=tuple(extra for extra in FILLED if extra in inspect.signature(function).parameters),
    )


def _is_async(function: Any) -> bool:
    plain = getattr(function, "func", function)
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004


def _with_unique_names(components: list[Component]) -> list[Component]:
    seen: Counter[str] = Counter()
    unique = []
    for component in components:
        seen[component.name] += 1
        if seen[component.name] > 1:
            unique.append(replace(component, name=f"{component.name}-{seen[component.name]}"))
        else:
            unique.append(component)
    return unique


async def _judge_all(
    components: Sequence[Component], prompt: Prompt, samples: Sequence[Sample], timeout_s: float | None
) -> list[list[Reward]]:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiting = [
        asyncio.ensure_future(_call_async(component, prompt, samples, deadline)) if component.is_async else None
        for component in components
    ]
    try:
        columns = []
        for component, future in zip(components, waiting, strict=True):
            columns.append(_call_sync(component, prompt, samples) if future is None else await future)
        return columns
    finally:
        for future in waiting:
            if future is not None and not future.done():
                future.cancel()


async def _call_async(
    component: Component, prompt: Prompt, samples: Sequence[Sample], deadline: float | None
) -> list[Reward]:
    """One call per sample, all at once, so that one slow or failing sample costs no other its reward."""
    calls = [samples] if component.whole_group else [[sample] for sample in samples]
    done = await asyncio.gather(*(_await_one(component, prompt, call, deadline) for call in calls))
    return [reward for rewards in done for reward in rewards]


async def _await_one(
    component: Component, prompt: Prompt, samples: Sequence[Sample], deadline: float | None
) -> list[Reward]:
    limit = None if deadline is None else max(0.0, deadline - time.monotonic())
    started = time.monotonic()
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            with ending_forks():
                returned = await component.call(prompt, samples)
            return _checked(component, returned, len(samples))
    except (_WrongReturn, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TimeoutError) and limit is not None and clock.expired():
            error_line = f"{component.name}: {TIMED_OUT} after {time.monotonic() - started:.3g} s"
            return [Reward(value=None, error=error_line) for _ in samples]
        return [_failed(component, error) for _ in samples]


def _call_sync(component: Component, prompt: Prompt, samples: Sequence[Sample]) -> list[Reward]:
    """One call for the group; if it raises, one per sample, so that only the guilty one is an error."""
    try:
        return _checked(component, component.call(prompt, samples), len(samples))
    except (_WrongReturn, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        if component.whole_group or len(samples) == 1:
            return [_failed(component, error) for _ in samples]
    return [reward for sample in samples for reward in _call_sync(component, prompt, [sample])]


class _WrongReturn(DataError):
    """The function itself is wrong: nothing can be attributed to a sample."""


def _checked(component: Component, returned: Any, count: int) -> list[Reward]:
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise _WrongReturn(f"reward '{component.name}' returned an awaitable; declare it with 'async def'")
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Sequence):
        raise _WrongReturn(
            f"reward '{component.name}' returned {type(returned).__name__}; "
            f"return a list with one number, dict, Reward or None per completion"
        )
    if len(returned) != count:
        raise _WrongReturn(
            f"reward '{component.name}' returned {len(returned)} judgements for {count} completions; "
            f"return exactly one per completion, in their order (None where there is no verdict)"
        )
    return [_as_reward(component, value) for value in returned]


def _as_reward(component: Component, value: Any) -> Reward:
    if isinstance(value, Reward):
        return _checked_reward(component, value)
    if value is None:
        return Reward(value=None, error=f"{component.name}: no verdict (returned None)")
    if isinstance(value, Mapping):
        parts = {str(key): _number(part) for key, part in value.items()}
        total = _number(sum(part for part in parts.values() if part is not None)) if parts else None
        bad = next((key for key, part in parts.items() if part is None), None)
        if bad is not None or total is None:
            what = f"part '{bad}' is {_shown(value.get(bad))}" if bad is not None else "no parts"
            return Reward(value=None, error=f"{component.name}: {what}; every part must be a finite number")
        return Reward(value=total, parts={key: part for key, part in parts.items() if part is not None})
    number = _number(value)
    if number is None:
        return Reward(value=None, error=f"{component.name}: returned {_shown(value)}; a finite number is needed")
    return Reward(value=number)


def _checked_reward(component: Component, reward: Reward) -> Reward:
    if reward.value is None:
        return Reward(value=None, error=f"{component.name}: {one_line(reward.error or 'a Reward without a value')}")
    value = _number(reward.value)
    parts = {str(key): _number(part) for key, part in reward.parts.items()}
    steps = [(int(index), _number(step)) for index, step in reward.steps]
    if value is None or None in parts.values() or any(step is None for _, step in steps):
        return Reward(value=None, error=f"{component.name}: a Reward with a value that is not a finite number")
    return Reward(
        value=value,
        parts={key: part for key, part in parts.items() if part is not None},
        correct=None if reward.correct is None else bool(reward.correct),
        steps=[(index, step) for index, step in steps if step is not None],
    )


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes | complex) or not hasattr(value, "__float__"):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _combine(components: Sequence[Component], rewards: Sequence[Reward]) -> Reward:
    """The weighted sum; parts are named and unweighted. One error makes the whole sample an error."""
    total = Reward(value=0.0)
    for component, reward in zip(components, rewards, strict=True):
        total.parts.update(_named_parts(component, reward))
        if total.correct is None or component.is_task:
            total.correct = total.correct if reward.correct is None else reward.correct
        if reward.value is None:
            total.error = total.error or reward.error
        else:
            total.value = (total.value or 0.0) + component.weight * reward.value
            total.steps += [(index, component.weight * step) for index, step in reward.steps]
    if total.error is None and not math.isfinite(total.value or 0.0):
        total.error = "the weighted sum of the rewards is not finite"
    return settled(total)


def settled(reward: Reward) -> Reward:
    """A judgement as a run can learn from it and keep it: no number beyond float32, texts that are UTF-8."""
    numbers = (reward.value or 0.0, *(step for _, step in reward.steps))
    beyond = next((number for number in numbers if abs(number) > FLOAT32_MAX), None)
    error = reward.error if beyond is None else reward.error or f"reward {beyond:g} is beyond what float32 holds"
    parts = {storable(name): part for name, part in reward.parts.items()}
    if error is not None:
        return Reward(value=None, parts=parts, error=storable(error), seconds=reward.seconds)
    return replace(reward, parts=parts)


def _named_parts(component: Component, reward: Reward) -> dict[str, float]:
    if reward.value is None:
        return {}
    if not reward.parts:
        return {component.name: reward.value}
    prefix = "" if component.is_task else f"{component.name}/"
    return {f"{prefix}{key}": part for key, part in reward.parts.items()}


def _failed(component: Component, error: BaseException) -> Reward:
    return Reward(value=None, error=f"{component.name}: {describe(error)}")


def describe(error: BaseException) -> str:
    """An exception on one line: its type, its message, and the line of the function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/upslope/tasks/scoring" not in frame.filename.replace("\\", "/")]
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
