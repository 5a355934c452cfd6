"""Credit behind noise: twelve noisy rewards, then a key may be taken, and four steps later it opens a door that pays.

Every learner starts from the same imitation of random walks through rooms (the key taken half the time) and gets
the same samples, 128 a step. `success` is the share of completions that opened the door over the last ten steps,
`margin` how far a learner with a critic is above the best of those that see the outcome only (RLOO, GRPO), with the
same seed. REINFORCE with a moving baseline stands between: no critic, but it credits a token with what comes after it.
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
from upslope.tasks.toys import ALPHABET, DIGITS, KeyDoor

NAME = "key_door"
OUTCOME_ONLY = ("rloo", "grpo")
CRITICS = ("a2c", "ppo")
LEARNERS = (*OUTCOME_ONLY, "reinforce_to_go", *CRITICS)
SEEDS = (0, 1, 2, 3, 4)
TASK = "key_door:steps=12,corridor=3,door=1.0,noise=3.0"
STEPS = 45
GROUP = 8
PROMPTS = 16
EXPECTED: dict[str, dict[str, tuple[str, float] | None]] = {
    learner: {"success": None, "margin": (">=", 0.2)} if learner in CRITICS else {"success": None}
    for learner in LEARNERS
}
_best: dict[int, float] = {}
"""The best success of a learner that sees the outcome only, by seed; they run first."""


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Imitate random walks, then learn from rewards; only the second part is timed."""
    task = load_task(TASK)
    assert isinstance(task, KeyDoor)
    rooms = task.prompts("train", 1000, seed=seed)
    pairs = [(str(room.text), task.demonstration(room)[-1].content) for room in rooms]
    fresh = letter_model(folder / "fresh", DIGITS + ALPHABET, seed=seed, width=48)
    start = imitate(fresh, pairs, folder / "imitation", seed=seed, steps=250)
    options = _options(learner, seed, start, folder / "run", task.length)
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
    outcome = _outcome(folder / "run", seconds)
    success = outcome.metrics["success"]
    if learner in CRITICS:
        outcome.metrics["margin"] = success - _best.get(seed, math.nan)
    elif learner in OUTCOME_ONLY:
        _best[seed] = max(success, _best.get(seed, 0.0))
    return outcome


def _options(learner: str, seed: int, model: Path, folder: Path, length: int) -> RLOptions:
    common: dict[str, Any] = {
        "model": str(model),
        "task": TASK,
        "output_dir": str(folder),
        "seed": seed,
        "dtype": "float32",
        "num_train_prompts": 2000,
        "num_prompts": PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": length,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "eval_every": 0,
        "eval_samples": 0,
        "save_every": 10_000,
    }
    critic: dict[str, Any] = {"lam": 0.95, "critic": "separate", "critic_learning_rate": 3e-3}
    if learner == "a2c":
        return PPOOptions(**common, **critic, num_epochs=1)
    if learner == "ppo":
        return PPOOptions(**common, **critic, num_epochs=2)
    if learner == "reinforce_to_go":
        return ReinforceOptions(**common, baseline="moving")
    return GRPOOptions(**common, advantage="grpo" if learner == "grpo" else "rloo")


def _outcome(folder: Path, seconds: float) -> Outcome:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line]
    per_step = GROUP * PROMPTS
    spent, curve = 0.0, []
    for i, line in enumerate(lines):
        spent += line["seconds/rollout"] + line["seconds/update"] + line["seconds/reward"]
        curve.append(((i + 1) * per_step, spent, line["accuracy"]))
    last = [line["accuracy"] for line in lines[-10:]]
    return Outcome({"success": sum(last) / len(last)}, len(lines) * per_step, seconds, curve)
