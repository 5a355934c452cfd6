"""English words to phonemes: after the same supervised start, what do equal seconds of each objective bring?

An encoder-decoder of half a million parameters learns from letters to spell phonemes (CMU dictionary, no stress) by
maximum likelihood, for a fixed number of steps. From that very checkpoint each learner goes on for the same seconds on
the same words: more likelihood (mle_longer), minimum-risk training with the phoneme error rate as cost (minimum_risk),
or self-critical sequence training, REINFORCE with the greedy reply as baseline (scst). Learner "mle" is the start.

Measured on 600 held-out words by greedy and beam decoding: phoneme error rate (per: edits to the nearest accepted
pronunciation over its length, summed) and word error rate (wer). ratio_per is per_greedy over that of the start.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Outcome
from upslope.build import load_policy, make_engine
from upslope.options import ReinforceOptions, RunOptions, Seq2SeqOptions
from upslope.recipes.reinforce import reinforce
from upslope.recipes.seq2seq import seq2seq
from upslope.rollout import collect
from upslope.tasks.base import load_task
from upslope.types import SamplingParams
from upslope.workers.rewards import make_scorer

NAME = "phonemes"
LEARNERS = ("mle", "mle_longer", "minimum_risk", "scst")
SEEDS = (0, 1, 2)
TASK = "phonemes"
WORDS = 60_000
HELD_OUT = 600
START_STEPS = 800
EXTRA_SECONDS = 15.0
LONGEST = 20
BEAMS = 4
_REPORTED: dict[str, tuple[str, float] | None] = dict.fromkeys(("per_greedy", "wer_greedy", "per_beam", "wer_beam"))
EXPECTED: dict[str, dict[str, tuple[str, float] | None]] = {
    "mle": _REPORTED | {"per_greedy": ("<=", 0.30)},
    "mle_longer": _REPORTED | {"ratio_per": ("<=", 1.0)},
    "minimum_risk": _REPORTED | {"ratio_per": ("<=", 1.05)},
    "scst": _REPORTED | {"ratio_per": ("<=", 1.08)},
}
"""From trials with a seed outside SEEDS. From a start whose learning rate had not come down (per 0.233) 48 steps of
minimum risk gave a ratio of 0.88, 33 of scst 0.97, 352 of likelihood 0.72; from one whose rate had (0.163) 77 steps of
minimum risk 1.02, 36 of scst 1.04. So only likelihood is expected to gain in these seconds, the others to hold on."""


@dataclass(frozen=True, slots=True)
class Start:
    """The supervised checkpoint of a seed, what it measures, and what it cost."""

    model: str
    metrics: dict[str, float]
    samples: int
    seconds: float


_STARTS: dict[int, Start] = {}
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Go on from the seed's checkpoint (trained once per process) and measure."""
    start = start_of(seed)
    first = (float(start.samples), start.seconds, start.metrics["per_greedy"])
    if learner == "mle":
        return Outcome(start.metrics, start.samples, start.seconds, [first])
    summary, per_step = _learn(learner, seed, start.model, folder / "run")
    metrics = measure(summary["model"])
    metrics["ratio_per"] = metrics["per_greedy"] / start.metrics["per_greedy"]
    metrics["steps"] = float(summary["steps"])
    samples, seconds = start.samples + summary["steps"] * per_step, start.seconds + summary["seconds"]
    return Outcome(metrics, samples, seconds, [first, (float(samples), seconds, metrics["per_greedy"])])


def start_of(seed: int) -> Start:
    """The checkpoint that all learners of a seed share."""
    if seed not in _STARTS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="upslope-phonemes-"))
        options = Seq2SeqOptions(
            **_shared(seed, Path(_FOLDERS[-1].name) / "run"),
            num_examples=WORDS,
            tokenizer="word",
            vocab_size=64,
            shared_vocabulary=False,
            hidden_size=128,
            num_layers=1,
            num_heads=2,
            dropout=0.0,
            batch_size=64,
            max_length=40,
            learning_rate=3e-3,
            warmup_steps=50,
            lr_scheduler_type="linear",
            max_steps=START_STEPS,
        )
        summary = seq2seq(options)
        samples = summary["steps"] * options.batch_size
        _STARTS[seed] = Start(summary["model"], measure(summary["model"]), samples, summary["seconds"])
    return _STARTS[seed]


def _shared(seed: int, folder: Path) -> dict[str, Any]:
    return {
        "task": TASK,
        "seed": seed,
        "output_dir": str(folder),
        "dtype": "float32",
        "max_completion_length": LONGEST,
        "eval_every": 0,
        "eval_samples": 0,
        "save_every": 10**9,
    }


def _learn(learner: str, seed: int, model: str, folder: Path) -> tuple[dict[str, Any], int]:
    """The run's summary, and how many samples one of its steps trains on."""
    more: dict[str, Any] = _shared(seed, folder) | {
        "model": model,
        "max_seconds": EXTRA_SECONDS,
        "max_steps": 10**6,
        "lr_scheduler_type": "constant",
    }
    if learner == "mle_longer":
        return seq2seq(Seq2SeqOptions(**more, num_examples=WORDS, max_length=40, batch_size=64, learning_rate=5e-4)), 64
    if learner == "minimum_risk":
        risk = Seq2SeqOptions(
            **more,
            num_examples=WORDS,
            max_length=40,
            objective="minimum_risk",
            batch_size=32,
            num_samples=8,
            alpha=5e-3,
            learning_rate=1e-4,
        )
        return seq2seq(risk), 32 * 8
    critical = ReinforceOptions(
        **more,
        baseline="greedy",
        num_train_prompts=WORDS,
        num_prompts=32,
        num_generations=8,
        learning_rate=1e-4,
    )
    return reinforce(critical), 32 * 8


def measure(model: str) -> dict[str, float]:
    """Error rates of greedy and beam decoding on held-out words."""
    task = load_task(TASK)
    prompts = task.prompts("eval", HELD_OUT, seed=0)
    policy = load_policy(RunOptions(model=model, dtype="float32"))
    policy.model.eval()
    engine = make_engine(policy, sequences=HELD_OUT * BEAMS, longest=64)
    found: dict[str, float] = {}
    for name, beams in (("greedy", 1), ("beam", BEAMS)):
        params = SamplingParams(max_tokens=LONGEST, temperature=0.0, beam_width=beams)
        with make_scorer(task) as judge, torch.no_grad():
            groups, _ = collect(engine, policy.tokenizer, judge, prompts, params)
        rewards = [group.rollouts[0].reward for group in groups]
        edits = sum(reward.parts["edits"] for reward in rewards)
        found[f"per_{name}"] = edits / sum(reward.parts["reference_length"] for reward in rewards)
        found[f"wer_{name}"] = sum(not reward.correct for reward in rewards) / len(rewards)
    return found
