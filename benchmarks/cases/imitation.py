"""Learning by imitation: a small decoder imitates its own right answers (expert iteration) or a better model (distill).

Sums of two digits, a 1.3-million-parameter decoder that has seen a little supervision.

raft, rest_em: five rounds of 77 prompts x 8 samples, what is right is kept and imitated, 32 sequences a step. RAFT
makes 15 steps a round and goes on from its weights; ReST-EM trains the start model anew, 40 steps a round.
`pass_first` and `pass_last` are the share of right samples of the first and the last round, before that round's own
training.

reverse, gkd: the same start learns from a teacher that had 300 more supervised steps, in 60 steps of 32 prompts: from
its own answers by reverse KL, or half from its own and half from the data's by JSD. `divergence_ratio` is the mean loss
of the last ten steps over that of the first.

sft, sft_dft, sft_smoothing: the same start imitates the data in 100 steps of 32, by likelihood, DFT or with smoothed
labels (0.1). `nll_ratio` is the plain likelihood loss of the last ten steps over that of the first.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cases.against_trl import TRAIN_PROMPTS, start
from benchmarks.harness import ROOT, Outcome
from upslope.cache import cache_root
from upslope.options import DistillOptions, ExpertOptions, SFTOptions
from upslope.recipes.distill import distill
from upslope.recipes.expert import expert
from upslope.recipes.sft import sft

NAME = "imitation"
LEARNERS = ("sft", "sft_dft", "sft_smoothing", "raft", "rest_em", "reverse", "gkd")
SEEDS = (0, 1, 2, 3, 4)
EXPECTED = {
    "sft": {"nll_ratio": ("<=", 0.15)},
    "sft_dft": {"nll_ratio": ("<=", 0.3)},
    "sft_smoothing": {"nll_ratio": ("<=", 0.45)},
    "raft": {
        "gain": (">=", 0.2),
        "pass_first": None,
        "pass_last": None,
        "self_bleu_first": None,
        "self_bleu_last": None,
    },
    "rest_em": {"gain": (">=", 0.1), "pass_first": None, "pass_last": None},
    "reverse": {"divergence_ratio": ("<=", 0.3), "accuracy": None},
    "gkd": {"divergence_ratio": ("<=", 0.3), "accuracy": None},
}
TASK = f"{ROOT / 'benchmarks' / 'sums.py'}:Sums"
COMMON: dict[str, Any] = {
    "task": TASK,
    "num_train_prompts": TRAIN_PROMPTS,
    "max_completion_length": 5,
    "dtype": "float32",
}
COMMON |= {"eval_every": 0, "lr_scheduler_type": "constant"}
ROUNDS = 5
ROUND_STEPS = {"raft": 15, "rest_em": 40}


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """One learner, once."""
    model = str(start(folder))
    if learner.startswith("sft"):
        return _supervised(learner, seed, folder / "run", model)
    if learner in ("raft", "rest_em"):
        return _expert(learner, seed, folder / "run", model)
    return _distill(learner, seed, folder / "run", model, str(_teacher(folder, model)))


def _supervised(learner: str, seed: int, folder: Path, model: str) -> Outcome:
    options = SFTOptions(
        model=model,
        task=TASK,
        output_dir=str(folder),
        seed=seed,
        loss="dft" if learner == "sft_dft" else "nll",
        label_smoothing=0.1 if learner == "sft_smoothing" else 0.0,
        num_examples=TRAIN_PROMPTS,
        batch_size=32,
        max_steps=100,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        dtype="float32",
        eval_every=0,
        eval_samples=0,
    )
    options.validate()
    summary = sft(options)
    losses = [step.get("loss/nll", step["loss"]) for step in _steps(folder)]
    share = summary["seconds"] / len(losses)
    curve = [(32.0 * (i + 1), share * (i + 1), loss) for i, loss in enumerate(losses)]
    metrics = {"nll_ratio": statistics.fmean(losses[-10:]) / losses[0]}
    return Outcome(metrics, 32 * len(losses), summary["seconds"], curve)


def _expert(learner: str, seed: int, folder: Path, model: str) -> Outcome:
    options = ExpertOptions(
        **COMMON,
        model=model,
        output_dir=str(folder),
        seed=seed,
        num_rounds=ROUNDS,
        train_steps=ROUND_STEPS[learner],
        num_prompts=TRAIN_PROMPTS,
        num_generations=8,
        batch_size=32,
        threshold=1.0,
        max_per_prompt=4,
        dedupe=False,
        restart=learner == "rest_em",
        learning_rate=3e-4,
        eval_samples=0,
    )
    options.validate()
    summary = expert(options)
    steps = _steps(folder)
    rounds = [step for step in steps if "expert/kept" in step]
    samples = TRAIN_PROMPTS * 8
    metrics = {
        "gain": rounds[-1]["accuracy"] - rounds[0]["accuracy"],
        "pass_first": rounds[0]["accuracy"],
        "pass_last": rounds[-1]["accuracy"],
        "self_bleu_first": rounds[0]["expert/all/self_bleu"],
        "self_bleu_last": rounds[-1]["expert/all/self_bleu"],
    }
    share = summary["seconds"] / len(rounds)
    curve = [(float((i + 1) * samples), (i + 1) * share, one["accuracy"]) for i, one in enumerate(rounds)]
    return Outcome(metrics, samples * len(rounds), summary["seconds"], curve)


def _distill(learner: str, seed: int, folder: Path, model: str, teacher: str) -> Outcome:
    options = DistillOptions(
        **COMMON,
        model=model,
        teacher=teacher,
        output_dir=str(folder),
        seed=seed,
        divergence="jsd" if learner == "gkd" else "reverse",
        on_policy_fraction=0.5 if learner == "gkd" else 1.0,
        num_prompts=32,
        max_steps=60,
        learning_rate=3e-4,
        eval_samples=20,
    )
    options.validate()
    summary = distill(options)
    losses = [step["loss"] for step in _steps(folder)]
    metrics = {
        "divergence_ratio": statistics.fmean(losses[-10:]) / losses[0],
        "accuracy": summary["evaluation"]["accuracy"]["value"],
    }
    share = summary["seconds"] / len(losses)
    curve = [(32.0 * (i + 1), share * (i + 1), loss) for i, loss in enumerate(losses)]
    return Outcome(metrics, 32 * len(losses), summary["seconds"], curve)


def _teacher(folder: Path, model: str) -> Path:
    """The start model after 300 more supervised steps: made once per process."""
    target = cache_root() / "bench" / f"sums-teacher-{os.getpid()}"
    if (target / "config.json").is_file():
        return target
    summary = sft(
        SFTOptions(
            model=model,
            task=TASK,
            output_dir=str(folder / "teacher"),
            num_examples=TRAIN_PROMPTS,
            batch_size=64,
            max_steps=300,
            learning_rate=1e-3,
            dtype="float32",
            eval_every=0,
            eval_samples=0,
            save_every=1000,
        )
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(summary["model"]).resolve().rename(target)
    return target


def _steps(folder: Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"eval/' not in line
    ]
