"""Rewards that are networks: computed in the trainer's own process, on its device, over whole packed steps.

A reward worker is a fresh interpreter without torch; a network has no place there. So `make_scorer` takes the specs
whose names are in MODEL_REWARDS out of --reward, builds what they name here, and adds their weighted part to what the
other rewards (in this process or in workers) gave. Parts are named and logged like all others.

A new one is a line in `upslope.tasks.loading.MODEL_REWARDS`: "name": "module:factory". The factory takes the spec's
parameters as arguments and, by keyword, what it has to read tokens with:

    def factory(path: str, *, tokenizer, device, policy_folder) -> ModelReward

Free of torch.
"""

from __future__ import annotations

import importlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from upslope.errors import ConfigError, DataError
from upslope.plugins import check_params, parse_spec
from upslope.rollout.judge import RewardSpecs, Scorer, finish
from upslope.tasks.loading import MODEL_REWARDS, parse_rewards
from upslope.tasks.scoring import settled
from upslope.types import Reward, RolloutGroup

__all__ = [
    "MODEL_REWARDS",
    "CombinedScorer",
    "ModelReward",
    "Surroundings",
    "WeightedReward",
    "load_model_rewards",
    "split_rewards",
]

GIVEN = ("tokenizer", "device", "policy_folder")
"""What a factory is given besides the parameters of its spec."""


class ModelReward(Protocol):
    """A reward computed by a network."""

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


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A summand: what computes it, the name of its part, its weight."""

    name: str
    weight: float
    model: ModelReward


def split_rewards(rewards: RewardSpecs) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(specs for `build_scoring`, specs of networks), each with their weights, in order."""
    plain, networks = [], []
    for spec, weight in parse_rewards(rewards):
        parsed = parse_spec(spec) if isinstance(spec, str) else None
        is_network = parsed is not None and parsed.path is None and parsed.name in MODEL_REWARDS
        (networks if is_network else plain).append((spec, weight))
    return plain, networks


def load_model_rewards(specs: Sequence[tuple[str, float]], surroundings: Surroundings) -> list[WeightedReward]:
    """Build what `specs` name. ConfigError: an unknown or missing parameter; else what the factory raises."""
    loaded, seen = [], Counter[str]()
    for spec, weight in specs:
        parsed = parse_spec(spec)
        module, _, attribute = MODEL_REWARDS[parsed.name].partition(":")
        factory = getattr(importlib.import_module(module), attribute)
        check_params(factory, parsed.params, parsed.label, filled=GIVEN)
        model = factory(**parsed.params, **{name: getattr(surroundings, name) for name in GIVEN})
        seen[parsed.name] += 1
        name = parsed.name if seen[parsed.name] == 1 else f"{parsed.name}-{seen[parsed.name]}"
        loaded.append(WeightedReward(name, weight, model))
    return loaded


class CombinedScorer:
    """What `base` judges (None: nothing) plus the weighted rewards of networks.

    The verdict stays the base's where it has one. One part that fails makes the whole sample an error.
    """

    def __init__(self, base: Scorer | None, extra: Sequence[WeightedReward]) -> None:
        if not extra:
            raise ConfigError("a combined scorer needs at least one reward that is a network")
        self.base, self.extra = base, list(extra)

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set every rollout's reward. DataError: a reward broke its contract, or no rollout could be judged."""
        started = time.perf_counter()
        if self.base is not None:
            self.base.judge(groups)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        totals = [r.reward for r in rollouts] if self.base is not None else [Reward(value=0.0) for _ in rollouts]
        for part in self.extra:
            begun = time.perf_counter()
            given = part.model.rewards(groups)
            if len(given) != len(rollouts):
                raise DataError(f"reward '{part.name}' returned {len(given)} judgements for {len(rollouts)} rollouts")
            seconds = (time.perf_counter() - begun) / max(1, len(rollouts))
            totals = [_added(total, part, one, seconds) for total, one in zip(totals, given, strict=True)]
        for rollout, total in zip(rollouts, totals, strict=True):
            rollout.reward = total
        return finish(groups, time.perf_counter() - started)

    def close(self) -> None:
        """End the base's workers."""
        if self.base is not None:
            self.base.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _added(total: Reward, part: WeightedReward, one: Reward, seconds: float) -> Reward:
    """The sum with one more summand; parts are named and unweighted, steps weighted, as in tasks.scoring."""
    parts = dict(total.parts)
    error = total.error
    if one.value is None or not math.isfinite(one.value):
        error = error or f"{part.name}: {one.error or f'the reward is {one.value}, not a finite number'}"
    else:
        own = {f"{part.name}/{key}": value for key, value in one.parts.items()} or {part.name: one.value}
        parts |= own
    correct = one.correct if total.correct is None else total.correct
    seconds += total.seconds
    if error is not None or total.value is None or one.value is None:
        return settled(Reward(value=None, parts=parts, error=error or "not judged", seconds=seconds))
    steps = [*total.steps, *((index, part.weight * step) for index, step in one.steps)]
    return settled(Reward(total.value + part.weight * one.value, parts, correct, None, seconds, steps))
