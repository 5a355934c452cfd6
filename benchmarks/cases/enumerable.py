"""A model small enough to enumerate: does every learner reach the exact optimum of the expected reward?

Three letters and the end of sequence, at most two tokens: 13 texts. One of them, drawn by the seed, is worth 1;
another is worth 0.7 times the share of its places that agree with it, plus up to 0.2 of its own. J is the expected
worth under the trained policy, computed over all texts; its optimum is 1: a policy that says the one text and nothing
else. Every learner runs its shipped configuration with the learning rate and the steps of this case.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.tiny_policy import letter_model
from benchmarks.harness import ROOT, Outcome
from upslope.build import Policy, load_policy
from upslope.config import load as load_config
from upslope.data.batching import collate
from upslope.options import ExpertOptions, GRPOOptions, PPOOptions, ReinforceOptions, RLOptions
from upslope.recipes.expert import expert
from upslope.recipes.grpo import grpo
from upslope.recipes.ppo import ppo
from upslope.recipes.reinforce import reinforce
from upslope.tasks.base import Task, content_key, derive_seed
from upslope.training.step import score
from upslope.types import Example, Prompt, Reward

NAME = "enumerable"
SEEDS = (0, 1, 2, 3, 4)
LETTERS = "abc"
LENGTH = 2
STEPS = 150
ROUNDS = 15
PROMPT = "c"
SHIPPED: dict[str, type[RLOptions]] = {
    **dict.fromkeys(
        ("reinforce_none", "reinforce_moving", "reinforce_learned", "reinforce_greedy", "reinforce_plus_plus"),
        ReinforceOptions,
    ),
    **dict.fromkeys(("ppo_a2c", "ppo_chain_sum", "ppo_vtrace"), PPOOptions),
    **dict.fromkeys(
        (
            *("grpo_chain_sum", "grpo_dapo", "grpo_gspo", "grpo_cispo", "grpo_sapo", "grpo_dr_grpo", "grpo_rloo"),
            "grpo_reinforce_plus_plus",
        ),
        GRPOOptions,
    ),
    "expert_raft": ExpertOptions,
}
"""The shipped configurations, by the stem of their file: their algorithm is run, on this task and model."""
LEARNERS = tuple(SHIPPED)
EXPECTED: dict[str, dict[str, tuple[str, float] | None]] = {
    learner: {"optimality": (">=", 0.99)} for learner in LEARNERS
}


class Lottery(Task):
    """A reward for every text of at most LENGTH letters, drawn once from `seed`."""

    name = "lottery"
    inline_safe = True

    def __init__(self, *, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(derive_seed("lottery", seed))
        texts = all_texts()
        # Not one with the prompt's letter: to rotary attention "c" and "cc" are one and the same input.
        sayable = [text for text in texts if PROMPT not in text]
        best = sayable[int(torch.randint(len(sayable), (), generator=draw))]
        own = (0.2 * torch.rand(len(texts), generator=draw)).tolist()
        self.values = {text: 0.7 * _agreement(text, best) + x for text, x in zip(texts, own, strict=True)}
        self.values[best] = 1.0

    def prompts(self, split: str, n: int, *, seed: int) -> list[Prompt]:  # type: ignore[override]
        """There is one prompt."""
        return [Prompt(key=content_key(PROMPT), text=PROMPT)] * n

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[Reward]:
        """The drawn value less 1: nothing but the best text is worth repeating, even without a baseline."""
        return [Reward(self.values[text] - 1.0) for text in completions]


def all_texts() -> list[str]:
    """Every text a policy can say."""
    return ["".join(t) for n in range(LENGTH + 1) for t in itertools.product(LETTERS, repeat=n)]


def _agreement(text: str, other: str) -> float:
    """Share of places, the end of sequence among them, at which two texts agree."""
    return sum(a == b for a, b in zip(text.ljust(LENGTH, "."), other.ljust(LENGTH, "."), strict=True)) / LENGTH


def expected_reward(policy: Policy, task: Lottery) -> float:
    """J, exactly: the probability of every text times its reward."""
    ids = {letter: i + 1 for i, letter in enumerate(LETTERS)}
    examples = []
    for text in task.values:
        tokens = [ids[letter] for letter in text] + [0] * (len(text) < LENGTH)
        examples.append(Example([ids[PROMPT], *tokens], [False] + [True] * len(tokens)))
    batch = collate(examples)
    logp_N = score(policy.model, [batch]).logp_N
    assert logp_N is not None
    logp_B = torch.zeros(len(examples), dtype=torch.float64).index_add_(0, batch.sequence_N, logp_N.double())
    total = float(logp_B.exp().sum())
    assert abs(total - 1) < 1e-4, total
    return float((logp_B.exp() * torch.tensor(list(task.values.values()), dtype=torch.float64)).sum())


def run(learner: str, seed: int, folder: Path) -> Outcome:
    """Train the shipped configuration on the lottery; measure J exactly."""
    fresh = letter_model(folder / "fresh", LETTERS, seed=seed, width=64)
    task = f"{Path(__file__).resolve()}:Lottery:seed={seed}"
    shipped = load_config(SHIPPED[learner], ROOT / "configs" / f"{learner}.toml")
    options = replace(shipped, **_changes(shipped, str(fresh), task, str(folder / "run"), seed))
    policy = load_policy(options)
    began = time.perf_counter()
    if isinstance(options, PPOOptions):
        ppo(options, policy=policy)
    elif isinstance(options, GRPOOptions):
        grpo(options, policy=policy)
    elif isinstance(options, ExpertOptions):
        expert(options, policy=policy)
    else:
        assert isinstance(options, ReinforceOptions)
        reinforce(options, policy=policy)
    seconds = time.perf_counter() - began
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines() if '"eval/' not in line
    ]
    batches = ROUNDS if isinstance(options, ExpertOptions) else len(lines)
    optimality = expected_reward(policy, Lottery(seed=seed))
    return Outcome({"optimality": optimality}, batches * options.num_prompts * options.num_generations, seconds)


def _changes(shipped: RLOptions, model: str, task: str, folder: str, seed: int) -> dict[str, Any]:
    """What this model and task need; what makes the algorithm is left as it is shipped."""
    learned = isinstance(shipped, ReinforceOptions) and shipped.baseline == "learned"
    changes: dict[str, Any] = {
        "model": model,
        "task": task,
        "output_dir": folder,
        "seed": seed,
        "dtype": "float32",
        "num_train_prompts": 16,
        "max_completion_length": LENGTH,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "overlong_buffer": 0,
        "truncated": "terminate",
        "eval_every": 0,
        "eval_samples": 0,
        "save_every": 10_000,
        "num_prompts": 8,
        "num_generations": 8,
    }
    if isinstance(shipped, ReinforceOptions):
        changes["kl_coef"] = 0.0
    if isinstance(shipped, PPOOptions) or learned:
        changes["critic_learning_rate"] = 1e-2
    if isinstance(shipped, GRPOOptions):
        changes |= {"beta": 0.0, "dynamic_sampling": False}
    if isinstance(shipped, ExpertOptions):
        # No text is right or wrong here: the best tenth of a round is kept, copies of a text too.
        changes |= {"keep": "top", "keep_share": 0.1, "dedupe": False, "max_per_prompt": 64}
        changes |= {"num_rounds": ROUNDS, "train_steps": STEPS // ROUNDS}
    return changes
