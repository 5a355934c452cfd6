"""The learning rate as a pure function of the optimizer step, so that a resumed run cannot get it wrong."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

from upslope.errors import ConfigError
from upslope.options import EncoderOptions, ExpertOptions, PretrainOptions, RunOptions, Seq2SeqOptions, SFTOptions
from upslope.options.finetune import PreferenceData

ScheduleKind = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, base: float, total_steps: int, warmup_steps: int = 0, kind: ScheduleKind = "linear"
) -> float:
    """The learning rate of update number `step` (0 is the first of `total_steps`).

    With W warm-up updates and S = `total_steps`: it rises as base * (step + 1) / (W + 1), so that no update is wasted
    on a rate of 0, and reaches base, the peak rate, at step W. From there, with progress p = (step - W) / (S - W):

        constant   base
        linear     base * (1 - p)
        cosine     base * (1 + cos(pi * p)) / 2

    The last two reach 0 at step S, one after the last update, and stay there.

    Raises:
        ConfigError: a value outside its range; the message names it.

    Sources: linear warm-up Goyal et al. 2017 (arXiv:1706.02677); cosine Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    _check(step, base, total_steps, warmup_steps, kind)
    if step < warmup_steps:
        return base * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return base
    left = total_steps - warmup_steps
    progress = min(1.0, (step - warmup_steps) / left) if left else 1.0
    return base * (1.0 - progress if kind == "linear" else (1.0 + math.cos(math.pi * progress)) / 2.0)


def rate_at(options: RunOptions, step: int) -> float:
    """The learning rate of a run's update number `step`, as its options say."""
    o = options
    return learning_rate(
        step, base=o.learning_rate, total_steps=o.max_steps, warmup_steps=o.warmup_steps, kind=o.lr_scheduler_type
    )


def _check(step: int, base: float, total_steps: int, warmup_steps: int, kind: str) -> None:
    kinds = get_args(ScheduleKind)
    for wrong, said in (
        (kind not in kinds, f"learning-rate schedule {kind!r} is not one of {', '.join(kinds)}"),
        (step < 0, f"step {step} must be >= 0"),
        (not (math.isfinite(base) and base >= 0.0), f"learning rate {base} must be finite and >= 0"),
        (total_steps < 1, f"total_steps {total_steps} must be >= 1"),
        (warmup_steps < 0, f"warmup_steps {warmup_steps} must be >= 0"),
        (warmup_steps > total_steps, f"warmup_steps {warmup_steps} exceeds the run's {total_steps} updates"),
    ):
        if wrong:
            raise ConfigError(said)


_IN_PASSES = PretrainOptions | SFTOptions | Seq2SeqOptions | EncoderOptions | PreferenceData
"""Whose num_epochs are passes over the data, and not over a step's rollouts."""


def in_steps(options: Any, items: int | None = None) -> Any:
    """The options with max_steps in place of num_epochs (passes over `items`) or of an expert's num_rounds."""
    if isinstance(options, ExpertOptions) and options.num_rounds is not None:
        return replace(options, max_steps=options.num_rounds * options.train_steps, num_rounds=None)
    if items is None or not isinstance(options, _IN_PASSES) or options.num_epochs is None:
        return options
    steps = max(1, round(options.num_epochs * items / options.batch_size))
    return replace(options, max_steps=steps, num_epochs=None)
