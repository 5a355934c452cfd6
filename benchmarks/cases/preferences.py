"""Putting letters in order: what preferences teach a policy, and what a reward model knows of unseen prompts.

Four different letters out of eight are to be said in order. A small decoder has seen both kinds of answers equally
often, the letters in order and the same letters shuffled, so about half of its samples are right. Every learner of a
seed goes on from that start (trained once per process, not timed).

dpo ... simpo: 60 steps of 32 rows {in order, shuffled} (kto: one labelled answer a row). `accuracy_before` and
`accuracy_after` are the shares of samples (temperature 1, 4 of each of 150 unseen prompts) that are in order, `gain`
their difference; `preference_accuracy` is the share of held-out rows judged rightly by the loss's own reward.

reward_outcome: Bradley-Terry on the same rows, read at the end of the answer; `pair_accuracy` on unseen prompts.
reward_process: three lines an answer, the first two, three and four letters of the prompt, each right if in order,
half of them not; 120 steps; `step_accuracy` on unseen prompts.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.held_out import held_out_curve
from benchmarks.cases.tiny_policy import imitate, letter_model
from benchmarks.harness import Expectation, Outcome
from upslope.build import load_policy, make_engine
from upslope.data.chat import encode_prompt
from upslope.options import DPOOptions, RewardOptions, RunOptions
from upslope.recipes.dpo import dpo
from upslope.recipes.reward import reward
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
STEPS = {**dict.fromkeys(LEARNERS, 60), "reward_process": 120}
BATCH = 32
LEARNING_RATE = {
    **{"dpo": 1e-4, "cdpo": 1e-4, "ipo": 3e-4, "kto": 1e-3, "orpo": 1e-3, "simpo": 1e-4},
    **{"reward_outcome": 3e-4, "reward_process": 1e-3},
}
"""Chosen on seed 100, which judges nothing."""
HELD_OUT = 150
"""Prompts that no training row has."""
SAMPLES = 4

REPORTED: dict[str, Expectation] = {"accuracy_before": None, "accuracy_after": None}
EXPECTED: dict[str, dict[str, Expectation]] = {
    # Seed 100, on which learning rates and steps were chosen, from 0.45 right samples.
    # Gains: dpo 0.38, cdpo 0.38, ipo 0.44, kto 0.47, orpo 0.55,
    # simpo 0.43; preference accuracy 1.0, kto 0.97. With three times the learning rate dpo gained 0.16 and simpo 0.21:
    # wrong orders are gone and every held-out pair is right, but answers of other lengths or letters, which no pair
    # shows, take their place.
    "dpo": {"gain": (">=", 0.2), "preference_accuracy": (">=", 0.95), **REPORTED},
    "cdpo": {"gain": (">=", 0.2), "preference_accuracy": (">=", 0.95), **REPORTED},
    "ipo": {"gain": (">=", 0.25), "preference_accuracy": (">=", 0.95), **REPORTED},
    "kto": {"gain": (">=", 0.25), "preference_accuracy": (">=", 0.85), **REPORTED},
    "orpo": {"gain": (">=", 0.35), "preference_accuracy": (">=", 0.95), **REPORTED},
    "simpo": {"gain": (">=", 0.2), "preference_accuracy": (">=", 0.95), **REPORTED},
    # The same seed: 1.0 and 0.99.
    "reward_outcome": {"pair_accuracy": (">=", 0.95), "brier": None},
    "reward_process": {"step_accuracy": (">=", 0.85), "brier": None},
}


@dataclass(frozen=True, slots=True)
class Start:
    """The supervised start of a seed and the share of its samples that are in order."""

    model: str
    accuracy: float


_STARTS: dict[int, Start] = {}
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """One learner from the seed's start; only its own training is timed."""
    start = start_of(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if learner in LOSSES:
        return _policy(learner, seed, folder, start)
    return _reward(learner, seed, folder, start)


def _policy(learner: str, seed: int, folder: Path, start: Start) -> Outcome:
    train, held_out = prompts_of(seed)
    rows = labelled if LOSSES[learner]["loss"] == "kto" else pairs
    data = _files(folder, rows(train, seed), rows(held_out, seed))
    options = DPOOptions(**_common(learner, seed, folder, start), **data, **LOSSES[learner])
    options.validate()
    summary = dpo(options)
    after = accuracy(summary["model"], held_out, seed)
    metrics = {
        "gain": after - start.accuracy,
        "accuracy_before": start.accuracy,
        "accuracy_after": after,
        "preference_accuracy": summary["evaluation"]["accuracy"]["value"],
    }
    return Outcome(
        metrics, summary["steps"] * BATCH, summary["seconds"], held_out_curve(folder / "run", "accuracy", BATCH)
    )


def _reward(learner: str, seed: int, folder: Path, start: Start) -> Outcome:
    train, held_out = prompts_of(seed)
    process = learner == "reward_process"
    rows = steps if process else pairs
    data = _files(folder, rows(train, seed), rows(held_out, seed))
    options = RewardOptions(**_common(learner, seed, folder, start), **data, kind="process" if process else "outcome")
    options.validate()
    summary = reward(options)
    name = "step_accuracy" if process else "pair_accuracy"
    found = summary["evaluation"]
    metrics = {name: found["accuracy"]["value"], "brier": found["brier"]}
    return Outcome(
        metrics, summary["steps"] * BATCH, summary["seconds"], held_out_curve(folder / "run", "accuracy", BATCH)
    )


def _common(learner: str, seed: int, folder: Path, start: Start) -> dict[str, Any]:
    return {
        "model": start.model,
        "output_dir": str(folder / "run"),
        "seed": seed,
        "dtype": "float32",
        "batch_size": BATCH,
        "max_steps": STEPS[learner],
        "learning_rate": LEARNING_RATE[learner],
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "eval_every": 20,
        "eval_samples": HELD_OUT,
        "save_every": 10_000,
    }


def start_of(seed: int) -> Start:
    """The start that all learners of a seed share."""
    if seed not in _STARTS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="upslope-preferences-"))
        folder = Path(_FOLDERS[-1].name)
        train, held_out = prompts_of(seed)
        fresh = letter_model(folder / "fresh", LETTERS + "=\n", seed=seed)
        both = [(row["prompt"], row[side]) for row in pairs(train, seed) for side in ("chosen", "rejected")]
        model = str(imitate(fresh, both, folder / "start", seed=seed, steps=START_STEPS))
        _STARTS[seed] = Start(model, accuracy(model, held_out, seed))
    return _STARTS[seed]


def accuracy(model: str, prompts: Sequence[str], seed: int) -> float:
    """The share of samples at temperature 1 that are the letters in order and nothing else."""
    policy = load_policy(RunOptions(model=model, dtype="float32"))
    policy.model.eval()
    engine = make_engine(policy, sequences=len(prompts) * SAMPLES, longest=2 * LENGTH + 4)
    asked = [encode_prompt(policy.tokenizer, Prompt(key=i, text=text)) for i, text in enumerate(prompts)]
    with torch.no_grad():
        said = engine.generate(asked, SamplingParams(max_tokens=LENGTH + 2, n=SAMPLES, temperature=1.0, seed=seed))
    ended = [(p, one) for p, several in zip(prompts, said, strict=True) for one in several]
    right = sum(one.finish_reason != "length" and one.text == ordered(p) for p, one in ended)
    return right / len(ended)


def prompts_of(seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out prompts such as "gbea=": all orders of all choices of letters, split by the seed."""
    every = ["".join(letters) + "=" for letters in itertools.permutations(LETTERS, LENGTH)]
    random.Random(seed).shuffle(every)
    return every[HELD_OUT:], every[:HELD_OUT]


def ordered(prompt: str) -> str:
    """The right answer."""
    return "".join(sorted(prompt[:-1]))


def shuffled(letters: str, rng: random.Random) -> str:
    """The letters in any order but the right one."""
    right = sorted(letters)
    wrong = list(right)
    while wrong == right:
        rng.shuffle(wrong)
    return "".join(wrong)


def pairs(prompts: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """Rows {prompt, chosen, rejected}."""
    rng = random.Random(f"pairs {seed}")
    return [{"prompt": p, "chosen": ordered(p), "rejected": shuffled(p[:-1], rng)} for p in prompts]


def labelled(prompts: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """Rows {prompt, completion, label}: one answer a prompt, good and bad in turn."""
    rows = pairs(prompts, seed)
    return [
        {"prompt": row["prompt"], "completion": row["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


def steps(prompts: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """Rows {prompt, steps, labels}."""
    rng = random.Random(f"steps {seed}")
    rows = []
    for prompt in prompts:
        labels = [rng.randint(0, 1) for _ in range(2, LENGTH + 1)]
        heads = [prompt[:n] for n in range(2, LENGTH + 1)]
        lines = ["".join(sorted(h)) if good else shuffled(h, rng) for h, good in zip(heads, labels, strict=True)]
        rows.append({"prompt": prompt, "steps": lines, "labels": labels})
    return rows


def _files(folder: Path, rows: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    paths = {"data": folder / "rows.jsonl", "eval_data": folder / "held_out.jsonl"}
    for path, some in zip(paths.values(), (rows, held_out), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}
