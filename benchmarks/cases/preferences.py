"""Putting letters in order: what preferences teach a policy, and what a reward model knows of unseen prompts.

Four different letters out of eight are to be said in order. A decoder of 76,000 parameters has seen both kinds of
answers equally often, four letters in order and the same letters shuffled, so about half of its samples are right.
Every learner of a seed goes on from that start (trained once per process, not timed).

dpo ... simpo: 60 steps of 32 rows {in order, shuffled} (kto: one labelled answer a row). `accuracy_before` and
`accuracy_after` are the shares of samples (temperature 1, 4 of each of 150 unseen prompts) that are in order, `gain`
their difference; `preference_accuracy` is the share of held-out rows with a positive margin (kto: judged rightly).

reward_outcome: Bradley-Terry on the same rows, read at the end of the answer; `pair_accuracy` on unseen prompts.
reward_process: three lines of an answer, each with the letters so far, right if in order, half of them not;
`step_accuracy` on unseen prompts.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.tiny_policy import imitate, letter_model
from benchmarks.harness import Expectation, Outcome
from upslope.build import load_policy, make_engine
from upslope.data.chat import encode_prompt
from upslope.options import DPOOptions, RewardOptions, RunOptions
from upslope.recipes.dpo import dpo
from upslope.recipes.reward import reward
from upslope.runs.store import read_evaluations
from upslope.types import Prompt, SamplingParams

NAME = "preferences"
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo"},
    "cdpo": {"loss": "dpo", "label_smoothing": 0.1},
    "ipo": {"loss": "ipo"},
    "kto": {"loss": "kto"},
    "orpo": {"loss": "orpo"},
    "simpo": {"loss": "simpo"},
}
LEARNERS = (*LOSSES, "reward_outcome", "reward_process")
SEEDS = (0, 1, 2, 3, 4)
LETTERS = "abcdefgh"
LENGTH = 4
START_STEPS = 300
STEPS = 60
BATCH = 32
HELD_OUT = 150
"""Prompts that no training row has."""
SAMPLES = 4

EXPECTED: dict[str, dict[str, Expectation]] = {}


@dataclass(frozen=True, slots=True)
class Start:
    """The supervised start of a seed and the share of its samples that are in order."""

    model: Path
    accuracy: float


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """One learner from the seed's start; only its own training is timed."""
    folder.mkdir(parents=True, exist_ok=True)
    if learner in LOSSES:
        return _policy(learner, seed, folder)
    return _reward(learner.removeprefix("reward_"), seed, folder)


def _policy(learner: str, seed: int, folder: Path) -> Outcome:
    start = start_of(seed)
    train, held_out = prompts_of(seed)
    rows = labelled if learner == "kto" else pairs
    options = DPOOptions(
        **_common(seed, start, folder),
        **LOSSES[learner],
        data=write(folder / "rows.jsonl", rows(train, seed)),
        eval_data=write(folder / "held_out.jsonl", rows(held_out, seed)),
        learning_rate=LEARNING_RATE[learner],
    )
    options.validate()
    summary = dpo(options)
    after = accuracy(summary["model"], held_out, seed)
    metrics = {
        "gain": after - start.accuracy,
        "accuracy_before": start.accuracy,
        "accuracy_after": after,
        "preference_accuracy": summary["evaluation"]["accuracy"]["value"],
    }
    return Outcome(metrics, summary["steps"] * BATCH, summary["seconds"], curve(folder / "run"))
