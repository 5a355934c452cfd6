"""How long a run is: its steps, where its options say passes or rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from upslope.options import EncoderOptions, ExpertOptions, PretrainOptions, Seq2SeqOptions, SFTOptions
from upslope.options.preference import PreferenceData

__all__ = ["in_steps"]

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
