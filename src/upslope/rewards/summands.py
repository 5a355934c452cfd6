"""From the texts of --reward to what is summed: functions, the task's own reward and networks, each with its weight.

A new function is a name in FUNCTIONS, a new network a line in NETWORKS: "name": "module:factory". The factory takes the
spec's parameters as arguments and, by keyword, what it has to read tokens with:

    def factory(path: str, *, around: Surroundings) -> NetworkReward

Free of torch.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upslope.errors import ConfigError
from upslope.plugins import Spec, check_file, check_params, find, format_spec, load, parse_spec
from upslope.types import Reward, Rollout, RolloutGroup

if TYPE_CHECKING:
    from upslope.tasks.base import Task

RewardSpecs = Iterable[str | tuple[str, float]]
_NAMES = "length format json_object repetition exact_match edit_similarity ngram_overlap token_f1 bleu chrf rouge"
FUNCTIONS: dict[str, str] = {name: f"upslope.rewards.functions:{name}" for name in _NAMES.split()}
"""Where every built-in reward function is."""
NETWORKS: dict[str, str] = {
    name: f"upslope.rewards.networks:load_{name}"
    for name in ("reward_model", "likelihood", "fluency", "coherence", "similarity", "relevance")
}
"""Where the factory of every reward is that is a network, computed in the trainer's process."""
TASK_REWARD = "task"
FILLED = {"num_tokens": "num_tokens", "finish_reasons": "finish_reason"}
"""What the judge fills in where a function asks for it by name, one value per completion: argument -> of Sample."""

_WEIGHT = re.compile(r"""(?P<spec>.*)@(?P<weight>[^@:,='"]*)""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a function may look at besides the prompt: the text, the tokens sampled, and why sampling ended."""

    text: str
    num_tokens: int
    finish_reason: str

    @classmethod
    def of(cls, rollout: Rollout) -> Sample:
        """What a function may see of a rollout."""
        return cls(rollout.text, sum(rollout.mask), rollout.finish_reason)


@dataclass(frozen=True)
class Summand:
    """One summand of the reward: `function(prompts, completions)`, or `function(groups)` of a network; and its weight.

    inline_safe: quick on any text, so that it needs no worker process. whole_group: it compares the completions of a
    group, which are never judged one by one. is_task: the task's own reward.
    """

    name: str
    function: Callable[..., Any]
    inline_safe: bool = False
    whole_group: bool = False
    is_task: bool = False
    weight: float = 1.0

    @cached_property
    def is_async(self) -> bool:
        """Whether calling the function gives a coroutine."""
        plain = getattr(self.function, "func", self.function)
        return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """What of FILLED the function asks for."""
        return tuple(extra for extra in FILLED if extra in inspect.signature(self.function).parameters)


class NetworkReward(Protocol):
    """A reward computed by a network. tokenizer: of the tokens that it reads."""

    tokenizer: Any

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """One Reward for every rollout of `groups`, in (prompt, sample) order, not yet weighted.

        A rollout that cannot be judged gets value None and a one-line error.
        """
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a network that judges shares with the policy: the tokenizer its tokens are of, the device, the folder."""

    tokenizer: Any
    device: Any
    policy_folder: Path


def parse_rewards(specs: Iterable[Any]) -> list[tuple[Any, float]]:
    """(spec, weight) pairs from texts such as "length:target=20@0.5", functions and such pairs; the weight is 1 unless
    given.

    "task" stands for the task's own reward. Raises ConfigError for a weight that is not a finite number.
    """
    pairs = []
    for item in specs:
        spec, weight = item if isinstance(item, tuple) else (item, 1.0)
        if match := _WEIGHT.fullmatch(item) if isinstance(item, str) else None:
            try:
                spec, weight = match["spec"], float(match["weight"])
            except ValueError:
                raise ConfigError(f"reward '{item}': '{match['weight']}' after @ is not a number") from None
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"reward '{spec}': the weight must be a finite number, got {weight!r}")
        pairs.append((spec, float(weight)))
    return pairs


def split_rewards(rewards: RewardSpecs) -> tuple[list[tuple[Any, float]], list[tuple[str, float]]]:
    """(what `load_summands` loads, specs of networks), each with their weights, in order."""
    pairs = [(spec, weight, _is_network(spec)) for spec, weight in parse_rewards(rewards)]
    plain, networks = ([(spec, weight) for spec, weight, is_one in pairs if is_one == kind] for kind in (False, True))
    return plain, networks


def _is_network(spec: Any) -> bool:
    return isinstance(spec, str) and (parsed := parse_spec(spec)).path is None and parsed.name in NETWORKS


def load_reward(spec: str | Callable[..., Any]) -> Summand:
    """The reward function that `spec` names: a built-in ("length:target=20") or one of a file ("my_rewards.py:fn").

    A function itself is judged with in this process.

    Raises ConfigError: unknown name or parameter, a file that does not load, or something that cannot be called with
    (prompts, completions).
    """
    if _is_network(spec):
        raise ConfigError(
            f"reward '{parse_spec(spec).name}' is a network: it runs beside the policy in a recipe that samples "
            "(--reward), not in a reward worker and not without a policy"
        )
    known = (*NETWORKS, TASK_REWARD)
    loaded = load(spec, FUNCTIONS, kind="reward", takes=("prompts", "completions"), filled=FILLED, known=known)
    quick, whole = (bool(getattr(loaded.plain, mark, False)) for mark in ("inline_safe", "whole_group"))
    return Summand(loaded.name, loaded.function, (quick and not loaded.own) or not isinstance(spec, str), whole)


def check_reward(parsed: Spec) -> None:
    """ConfigError where a reward cannot be loaded. A file is read and not run: that is for a reward worker."""
    if parsed.path is not None:
        check_file(parsed)
    elif parsed.name not in (TASK_REWARD, *NETWORKS):
        load_reward(format_spec(parsed))


def load_summands(task: Task | None, rewards: RewardSpecs = ()) -> list[Summand]:
    """The task's own reward, or `rewards` in its place ("task" among them is the task's own); no networks.

    Raises ConfigError: there is nothing that judges, or a name is unknown.
    """
    pairs, own = parse_rewards(rewards), None
    if task is not None and task.has_reward:
        own = Summand(task.name, task.rewards, task.inline_safe, task.whole_group, is_task=True)
    elif not pairs:
        named = f"task '{task.name}' has no reward of its own" if task else "no task is given"
        raise ConfigError(f"{named}; name a reward, such as --reward my_rewards.py:fn")
    elif any(spec == TASK_REWARD for spec, _ in pairs):
        raise ConfigError("the reward 'task' means the task's own, and there is none")
    return _named(
        replace(own if own and spec == TASK_REWARD else load_reward(spec), weight=weight)
        for spec, weight in pairs or [(TASK_REWARD, 1.0)]
    )


def load_networks(specs: Sequence[tuple[str, float]], around: Surroundings) -> list[Summand]:
    """Build what `specs` name. ConfigError: an unknown or missing parameter; else what the factory raises."""
    loaded = []
    for spec, weight in specs:
        parsed = parse_spec(spec)
        factory = find(parsed, NETWORKS, kind="reward")
        check_params(factory, parsed.params, parsed.label, filled=("around",))
        loaded.append(Summand(parsed.name, factory(**parsed.params, around=around).rewards, weight=weight))
    return _named(loaded)


def _named(summands: Iterable[Summand]) -> list[Summand]:
    """Each with a name of its own."""
    seen: Counter[str] = Counter()
    unique = []
    for one in summands:
        seen[one.name] += 1
        unique.append(one if seen[one.name] == 1 else replace(one, name=f"{one.name}-{seen[one.name]}"))
    return unique
