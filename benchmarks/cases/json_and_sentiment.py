"""SmolLM2-135M itself: strict JSON by GRPO, and what positive sentiment costs in KL under PPO.

grpo_json: the instruct model turns a sentence into {"name": ..., "age": ...} and nothing around it. Greedy pass rate on
64 held-out sentences, and that of the samples at temperature 1, before and after 20 steps of 8 x 8 completions; the
curve is the pass rate of each step's samples.

ppo_sentiment: continuations of neutral openings, rewarded by VADER's score, with an adaptive KL penalty. Three runs of
15 steps aim at 0.5, 2 and 8 nats per completion, from coefficients of 1, 0.3 and 0.05; each is a point of the frontier,
and the curve holds (samples, KL, reward) of each. KL and reward are means over a run's last three steps; the reward
before is the first step's, whose samples are the untrained model's.

A first run with seed 0 asked for a greedy gain of 0.2 from a model that passes 86% before training (it rose to 100%),
and its KL targets of 1, 4 and 16 nats were never reached at a rate of 2e-5: three times the same run. A second try let
the coefficient move up to 1.8-fold a step, down 5-fold, and overshot every target. What stands here was set after that,
and judged with another seed.

One seed, because the model takes seconds a step on two cores: nothing is known here about the spread over seeds.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.harness import Outcome
from upslope.build import load_policy
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.options import GRPOOptions, PPOOptions
from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import ppo

NAME = "json_and_sentiment"
LEARNERS = ("grpo_json", "ppo_sentiment")
SEEDS = (1,)
EXPECTED = {
    "grpo_json": {
        "pass_after": (">=", 0.95),
        "sampled_pass_gain": (">=", 0.5),
        "pass_before": None,
        "sampled_pass_first": None,
        "sampled_pass_last": None,
        "reward_last": None,
    },
    "ppo_sentiment": {
        "reward_gain": (">=", 0.1),
        "reward_before": None,
        "reward_at_0.5": None,
        "reward_at_2": None,
        "reward_at_8": None,
        "kl_at_0.5": ("<=", 1.0),
        "kl_at_2": None,
        "kl_at_8": None,
    },
}
JSON: dict[str, Any] = {"task": "strict_json", "num_prompts": 8, "num_generations": 8, "max_completion_length": 20}
JSON |= {"max_steps": 20, "learning_rate": 3e-5, "eval_samples": 64}
SENTIMENT: dict[str, Any] = {"task": "sentiment", "num_train_prompts": 200, "num_prompts": 32, "num_generations": 2}
SENTIMENT |= {"max_completion_length": 16, "max_steps": 15, "learning_rate": 5e-5, "num_epochs": 1}
SENTIMENT |= {"num_minibatches": 2, "kl_horizon": 64, "eval_samples": 0}
COMMON: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 2, "eval_every": 0}
KL_TARGETS = {0.5: 1.0, 2.0: 0.3, 8.0: 0.05}
"""Target -> coefficient at the start."""
LAST = 3
"""Steps at the end over which a run's reward and KL are averaged."""


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """One learner, once."""
    return strict_json(seed, folder) if learner == "grpo_json" else sentiment(seed, folder)


def strict_json(seed: int, folder: Path) -> Outcome:
    """Pass rate before and after."""
    options = GRPOOptions(**COMMON, **JSON, seed=seed, output_dir=str(folder / "json"))
    options.validate()
    with begin(options) as begun, closing(GRPO(options, load_policy(options))) as learner:
        before = learner.evaluate(0)
        started = time.perf_counter()
        summary = train("grpo", options, learner, begun)
        seconds = time.perf_counter() - started
    assert before is not None
    steps = steps_of(folder / "json")
    after = summary["evaluation"]["accuracy"]["value"]
    samples = options.num_prompts * options.num_generations
    metrics = {
        "pass_before": before.value,
        "pass_after": after,
        "sampled_pass_gain": mean_of(steps, "accuracy") - steps[0]["accuracy"],
        "sampled_pass_first": steps[0]["accuracy"],
        "sampled_pass_last": mean_of(steps, "accuracy"),
        "reward_last": mean_of(steps, "reward"),
    }
    per_step = summary["seconds"] / len(steps)
    curve = [(float((i + 1) * samples), (i + 1) * per_step, step["accuracy"]) for i, step in enumerate(steps)]
    return Outcome(metrics, samples * len(steps), seconds, curve)


def sentiment(seed: int, folder: Path) -> Outcome:
    """The frontier of reward and KL."""
    metrics: dict[str, float] = {}
    curve = []
    seconds, samples = 0.0, 0
    for target, coefficient in KL_TARGETS.items():
        place = folder / f"kl-{target:g}"
        options = PPOOptions(
            **COMMON, **SENTIMENT, kl_coef=coefficient, kl_target=target, seed=seed, output_dir=str(place)
        )
        options.validate()
        seconds += ppo(options)["seconds"]
        steps = steps_of(place)
        samples += len(steps) * options.num_prompts * options.num_generations
        kl, reward = mean_of(steps, "objective/kl"), mean_of(steps, "reward")
        metrics |= {f"kl_at_{target:g}": kl, f"reward_at_{target:g}": reward}
        metrics.setdefault("reward_before", steps[0]["reward"])
        curve.append((float(samples), kl, reward))
    metrics["reward_gain"] = metrics["reward_at_8"] - metrics["reward_before"]
    return Outcome(metrics, samples, seconds, curve)


def steps_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of every step."""
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"eval/' not in line
    ]


def mean_of(steps: Sequence[dict[str, float]], name: str) -> float:
    """Over the last steps."""
    return statistics.fmean(step[name] for step in steps[-LAST:])
