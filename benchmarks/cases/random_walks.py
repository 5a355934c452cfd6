"""Shortest paths on a random graph of 21 nodes, after imitating random walks: samples and seconds to optimality 0.9.

Every learner starts from the same imitated weights (same seed), with the same 128 samples per step, learning rate and
schedule. Optimality is the mean over the training samples of three steps, sampled at temperature 1.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.cases.tiny_policy import imitate, letter_model
from benchmarks.harness import Outcome
from upslope.build import load_policy
from upslope.options import GRPOOptions, PPOOptions, ReinforceOptions, RLOptions
from upslope.recipes.grpo import grpo
from upslope.recipes.ppo import ppo
from upslope.recipes.reinforce import reinforce
from upslope.tasks.base import load_task
from upslope.tasks.toys import LETTERS, RandomWalks

NAME = "random_walks"
LEARNERS = ("reinforce", "a2c", "ppo", "rloo", "grpo")
SEEDS = (0, 1, 2, 3, 4)
GOAL = 0.9
STEPS = 40
GROUP = 16
PROMPTS = 8
REACHED = {"final_optimality": (">=", GOAL), "samples_to_0.9": ("<=", 128 * STEPS), "seconds_to_0.9": None}
EXPECTED: dict[str, dict[str, tuple[str, float] | None]] = {learner: dict(REACHED) for learner in LEARNERS}


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Imitate, then learn from rewards; only the second part is timed."""
    task = load_task("random_walks")
    assert isinstance(task, RandomWalks)
    walks = [(walk[0], walk[1:]) for walk in task.walks(1000, seed=seed)]
    fresh = letter_model(folder / "fresh", LETTERS[: task.nodes], seed=seed)
    start = imitate(fresh, walks, folder / "imitation", seed=seed, steps=100)
    options = _options(learner, seed, start, folder / "run", len(task.starts), task.max_length)
    policy = load_policy(options)
    began = time.perf_counter()
    if isinstance(options, PPOOptions):
        ppo(options, policy=policy)
    elif isinstance(options, GRPOOptions):
        grpo(options, policy=policy)
    else:
        assert isinstance(options, ReinforceOptions)
        reinforce(options, policy=policy)
    seconds = time.perf_counter() - began
    return _outcome(folder / "run", seconds)


def _options(learner: str, seed: int, model: Path, folder: Path, starts: int, max_length: int) -> RLOptions:
    common: dict[str, Any] = {
        "model": str(model),
        "task": "random_walks",
        "output_dir": str(folder),
        "seed": seed,
        "dtype": "float32",
        "num_train_prompts": starts,
        "num_prompts": PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": max_length - 1,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "eval_every": 0,
        "eval_samples": 0,
        "save_every": 10_000,
    }
    if learner == "reinforce":
        return ReinforceOptions(**common, baseline="moving")
    if learner == "a2c":
        return PPOOptions(**common, num_epochs=1, num_minibatches=1, lam=0.95)
    if learner == "ppo":
        return PPOOptions(**common | {"learning_rate": 5e-4}, num_epochs=2, num_minibatches=2, lam=0.95)
    return GRPOOptions(**common, advantage="grpo" if learner == "grpo" else "rloo")


def _outcome(folder: Path, seconds: float) -> Outcome:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line]
    per_step = GROUP * PROMPTS
    spent, curve = 0.0, []
    reached_samples = reached_seconds = math.inf
    for i, line in enumerate(lines):
        spent += line["seconds/rollout"] + line["seconds/update"] + line["seconds/reward"]
        window = [each["reward"] for each in lines[max(0, i - 2) : i + 1]]
        value = sum(window) / len(window)
        curve.append(((i + 1) * per_step, spent, value))
        if value >= GOAL and i >= 2 and math.isinf(reached_samples):
            reached_samples, reached_seconds = (i + 1) * per_step, spent
    last = lines[-10:]
    metrics = {
        "final_optimality": sum(line["reward"] for line in last) / len(last),
        "samples_to_0.9": reached_samples,
        "seconds_to_0.9": reached_seconds,
    }
    return Outcome(metrics, len(lines) * per_step, seconds, curve)
