"""The learning rate as a pure function of the optimizer step, so that a resumed run cannot get it wrong."""

from __future__ import annotations

import math
from typing import Literal, get_args

from upslope.errors import ConfigError
from upslope.options import RunOptions

ScheduleKind = Literal["constant", "linear", "cosine", "wsd"]


def scheduled(step: int, o: RunOptions) -> float:
    """The learning rate of update number `step` under the options of a run."""
    return learning_rate(
        step, base=o.learning_rate, total_steps=o.max_steps, warmup_steps=o.warmup_steps, kind=o.lr_scheduler_type
    )


def learning_rate(
    step: int,
    *,
    base: float,
    total_steps: int | None = None,
    warmup_steps: int = 0,
    warmup_ratio: float = 0.0,
    kind: ScheduleKind = "linear",
    min_ratio: float = 0.0,
    decay_ratio: float = 0.1,
) -> float:
    """The learning rate of update number `step` (0 is the first of `total_steps`).

    With W warm-up updates and S = `total_steps`: it rises as base * (step + 1) / (W + 1), so that no update is wasted
    on a rate of 0, and reaches base at step W. From there, with progress p = (step - W) / (S - W):

        constant   base
        linear     base * (1 - (1 - min_ratio) * p)
        cosine     base * (min_ratio + (1 - min_ratio) * (1 + cos(pi * p)) / 2)
        wsd        base until the last `decay_ratio` * S updates, then linearly down (warm-up, stable, decay)

    All but constant reach base * min_ratio at step S, one after the last update, and stay there.

    Args:
        base: the peak rate.
        total_steps: S; only "constant" can do without (then with `warmup_steps`, not `warmup_ratio`).
        warmup_steps: W; or `warmup_ratio`: W = ceil(warmup_ratio * S). Not both.
        min_ratio: the final rate as a share of base, in [0, 1].
        decay_ratio: the share of S that "wsd" decays over, in (0, 1].

    Raises:
        ConfigError: a value outside its range; the message names it.

    Sources: linear warm-up Goyal et al. 2017 (arXiv:1706.02677); cosine Loshchilov and Hutter 2017
    (arXiv:1608.03983); warm-up-stable-decay Hu et al. 2024 (arXiv:2404.06395).
    """
    _check(step, base, total_steps, kind, min_ratio, decay_ratio)
    warmup = _warmup(total_steps, warmup_steps, warmup_ratio)
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if kind == "constant" or total_steps is None:
        return base
    start = max(warmup, total_steps - math.ceil(decay_ratio * total_steps)) if kind == "wsd" else warmup
    if step < start:
        return base
    progress = min(1.0, (step - start) / (total_steps - start)) if total_steps > start else 1.0
    left = 1.0 - progress if kind != "cosine" else (1.0 + math.cos(math.pi * progress)) / 2.0
    return base * (min_ratio + (1.0 - min_ratio) * left)


def _warmup(total_steps: int | None, warmup_steps: int, warmup_ratio: float) -> int:
    if warmup_steps < 0 or not 0.0 <= warmup_ratio <= 1.0:
        raise ConfigError(f"warmup_steps {warmup_steps} must be >= 0 and warmup_ratio {warmup_ratio} in [0, 1]")
    if warmup_steps and warmup_ratio:
        raise ConfigError(f"warmup_steps {warmup_steps} and warmup_ratio {warmup_ratio} exclude each other; give one")
    if warmup_ratio and total_steps is None:
        raise ConfigError("warmup_ratio needs total_steps; give warmup_steps instead")
    warmup = warmup_steps or math.ceil(warmup_ratio * (total_steps or 0))
    if total_steps is not None and warmup > total_steps:
        raise ConfigError(f"warmup_steps {warmup} exceeds the run's {total_steps} updates")
    return warmup


def _check(step: int, base: float, total_steps: int | None, kind: str, min_ratio: float, decay_ratio: float) -> None:
    if kind not in get_args(ScheduleKind):
        raise ConfigError(f"learning-rate schedule {kind!r} is not one of {', '.join(get_args(ScheduleKind))}")
    if step < 0:
        raise ConfigError(f"step {step} must be >= 0")
    if not (math.isfinite(base) and base >= 0.0):
        raise ConfigError(f"learning rate {base} must be finite and >= 0")
    if total_steps is None and kind != "constant":
        raise ConfigError(f"the {kind} schedule needs total_steps; use constant for a run of unknown length")
    if total_steps is not None and total_steps < 1:
        raise ConfigError(f"total_steps {total_steps} must be >= 1")
    if not 0.0 <= min_ratio <= 1.0:
        raise ConfigError(f"min_ratio {min_ratio} must be in [0, 1]")
    if not 0.0 < decay_ratio <= 1.0:
        raise ConfigError(f"decay_ratio {decay_ratio} must be in (0, 1]")
