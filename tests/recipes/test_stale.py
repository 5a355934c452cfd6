"""Rollouts of older weights: which weights sampled what, how the gradient is corrected, and the bits after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import estimated
from functional.enumerable import EnumerableLM
from test_recipes import TASK, lines, rl
from test_resume import assert_same, comparable

from upslope.build import load_policy
from upslope.functional.policy_losses import importance_weights
from upslope.functional.policy_losses import reinforce as likelihood_ratio
from upslope.functional.returns import discounted_returns, lambda_returns, vtrace
from upslope.loop import sampler as sampler_module
from upslope.loop.sampler import RolloutQueue, Sampled
from upslope.options import GRPOOptions, PPOOptions, ReinforceOptions
from upslope.recipes.grpo import GRPO, grpo
from upslope.recipes.ppo import PPO, ppo
from upslope.recipes.reinforce import Reinforce, reinforce
from upslope.runs.folder import Run
from upslope.types import Prompt, Reward, Rollout, RolloutGroup


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "letter.py"
    path.write_text(TASK)
    return f"{path}:Letter"


LEARNERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ppo": (PPOOptions, ppo, {}),
    "vtrace": (PPOOptions, ppo, {"advantage": "vtrace", "num_epochs": 1}),
    "grpo": (GRPOOptions, grpo, {"dynamic_sampling": True, "rollout_correction": "sequence"}),
    "reinforce": (ReinforceOptions, reinforce, {"baseline": "greedy"}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_rollouts_come_from_the_weights_of_lag_steps_ago(name: str, tiny: Path, task: str, tmp_path: Path) -> None:
    kind, recipe, changes = LEARNERS[name]
    task = _varied(tmp_path) if name == "grpo" else task
    recipe(kind(**rl(tiny, task, tmp_path / "run", rollout_lag=2, max_steps=5, eval_samples=0, **changes)))
    logged = lines(tmp_path / "run")
    assert [line["rollout/lag"] for line in logged] == [0, 1, 2, 2, 2]
    assert logged[0]["rollout/max_logprob_diff"] == 0
    assert all(line["rollout/max_logprob_diff"] > 0 for line in logged[2:])
    with Run.open(tmp_path / "run", read_only=True) as run:
        versions = {(r.step, r.version) for r in run.store.rollouts(limit=-1)}
    assert versions == {(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)}


def _varied(folder: Path) -> str:
    """A task whose rewards always differ within a group."""
    path = folder / "varied.py"
    path.write_text(TASK.replace('text.count("a") / 4', "sum(map(ord, text)) % 97 / 97"))
    return f"{path}:Letter"


def test_auto_corrects_per_token_once_the_weights_differ(
    tiny: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "samples_exactly", lambda *_: False)
    common = rl(tiny, task, tmp_path / "run")
    for kind, make in ((PPOOptions, PPO), (GRPOOptions, GRPO), (ReinforceOptions, Reinforce)):
        learner = make(kind(**common), load_policy(kind(**common)))
        sampled = learner.sampler.next(0)
        exact, _ = estimated(learner, sampled.groups)
        assert "importance" not in exact.columns()
        with torch.no_grad():
            learner.policy.model.model.embed_tokens.weight.mul_(1.5)
        stale, _ = estimated(learner, sampled.groups)
        expected = (stale.old_logprobs - stale.sampling_logprobs).exp().clamp(max=2.0)
        torch.testing.assert_close(stale.importance, expected)
        assert stale.importance.std() > 0.01


def test_vtrace_on_policy_is_the_lambda_return(tiny: Path, task: str, tmp_path: Path) -> None:
    """Without lag: targets are lambda-returns, advantages r + gamma v' - V; at lam = 1 the same as GAE's."""
    for lam in (1.0, 0.7):
        found = {}
        for advantage in ("vtrace", "gae"):
            options = PPOOptions(
                **rl(tiny, task, tmp_path / "run", advantage=advantage, gamma=0.9, lam=lam, whiten_advantages=False)
            )
            learner = PPO(options, load_policy(options))
            torch.manual_seed(0)
            torch.nn.init.normal_(learner.critic.network.head.score.weight)
            found[advantage], _ = estimated(learner, learner.sampler.next(0).groups)
        x, mask = found["vtrace"], found["vtrace"].mask_BT
        values, rewards = x.padded(x.values), torch.zeros(mask.shape)
        last = mask.sum(1) - 1
        scores = torch.tensor([r.reward.value for r in found["vtrace"].rollouts])
        rewards[torch.arange(len(last)), last] = scores
        targets = lambda_returns(rewards, values, mask, gamma=0.9, lam=lam)
        following = torch.cat([targets[:, 1:], torch.zeros(len(last), 1)], 1)
        torch.testing.assert_close(x.padded(x.returns), targets)
        torch.testing.assert_close(x.padded(x.advantages), (rewards + 0.9 * following - values) * mask)
        if lam == 1.0:
            torch.testing.assert_close(x.advantages, found["gae"].advantages)
        else:
            assert not torch.allclose(x.advantages, found["gae"].advantages)


@pytest.mark.parametrize("variant", ["token", "sequence", "geometric", "vtrace"])
def test_correction_brings_the_expected_gradient_nearer_to_the_true_one(variant: str) -> None:
    """All sequences of a small model, sampled by the weights of two ascent steps ago, in exact expectation.

    The formulas are those the recipes call; their true gradient is that of J at the present weights.
    """
    lm = EnumerableLM(vocabulary=4, length=3, seed=3)
    behaviour = lm.logits.detach().clone()
    for _ in range(2):
        ascent = lm.gradient(lm.objective())
        with torch.no_grad():
            lm.logits += 0.6 * ascent
    true = lm.gradient(lm.objective())
    logp_ST, mu_ST = lm.logp_ST(), lm.logp_ST(behaviour).detach()
    probability_S = lm.logp_S(behaviour).detach().exp()
    rewards, mask = lm.rewards_ST, lm.mask_ST
    advantages = discounted_returns(rewards, mask, gamma=1.0)

    def error(weighted_ST: torch.Tensor, advantages_ST: torch.Tensor) -> float:
        loss_ST = torch.where(mask, likelihood_ratio(logp_ST, advantages_ST) * weighted_ST, 0.0)
        gradient = lm.gradient(-(probability_S * loss_ST.sum(1)).sum())
        return float((gradient - true).norm() / true.norm())

    ones = torch.ones_like(advantages)
    uncorrected = error(ones, advantages)
    assert uncorrected > 0.1
    if variant == "vtrace":
        values = torch.where(mask, lm.true_values(), 0.0)
        log_ratio = torch.where(mask, logp_ST.detach() - mu_ST, 0.0)
        corrected = error(ones, vtrace(log_ratio, rewards, values, mask, gamma=1.0)[0])
        stale, _ = vtrace(torch.zeros_like(log_ratio), rewards, values, mask, gamma=1.0)
        uncorrected = error(ones, stale)
    else:
        weights = importance_weights(logp_ST, mu_ST, mask, level=variant, high=2.0)  # type: ignore[arg-type]
        corrected = error(weights, advantages)
    # V-trace's fixed point is a policy between the two, so it comes less near than plain weights do.
    assert corrected < (0.9 if variant == "vtrace" else 0.8) * uncorrected, (corrected, uncorrected)
    if variant == "sequence":
        unbounded = importance_weights(logp_ST, mu_ST, mask, level="sequence", high=1e9)
        assert error(unbounded, advantages) < 1e-9, "the whole product is unbiased"


@pytest.mark.parametrize("name", LEARNERS)
def test_resume_with_a_lag_is_bit_for_bit(name: str, tiny: Path, task: str, tmp_path: Path) -> None:
    kind, recipe, changes = LEARNERS[name]
    task = _varied(tmp_path) if name == "grpo" else task
    common = rl(tiny, task, tmp_path / "whole", rollout_lag=2, max_steps=4, eval_samples=0, **changes)
    options = kind(**common | {"lr_scheduler_type": "constant", "save_every": 1})
    recipe(options)
    half = replace(options, output_dir=str(tmp_path / "parts"), max_steps=2)
    recipe(half)
    recipe(replace(half, max_steps=4, resume=True))
    found, expected = comparable(tmp_path / "parts"), comparable(tmp_path / "whole")
    for run in (found, expected):
        for batch in run["state"]["learner"]["queue"]:
            for group in (*batch["groups"], *batch["greedy"]):
                for rollout in group["rollouts"]:
                    rollout["reward"].pop("seconds")
    assert_same(found, expected)


def test_queue_survives_its_own_description() -> None:
    """Observed tokens, NaN log-probs, step rewards, errors: what goes into a checkpoint comes out of it."""
    prompts = [Prompt(key=i, text=str(i)) for i in range(3)]
    nan = float("nan")
    odd = Rollout([1, 2], [3, 4], [True, False], [-0.1, nan], [-1 / 3, nan], "length", "x\n\u20ac", 1, version=7)
    odd.reward = Reward(value=1 / 3, parts={"a": 0.1}, correct=True, steps=[(0, 0.5)])
    failed = Rollout([1], [5], [True], [-2.0], [-2.0], "stop", "", 0, reward=Reward(value=None, error="no"))
    queue = RolloutQueue(2, prompts)
    batches = [
        Sampled([RolloutGroup(prompts[2], [odd, failed])], {"reward/errors": 1.0}),
        Sampled([RolloutGroup(prompts[0], [failed])], {}, [RolloutGroup(prompts[0], [odd])]),
    ]
    queue.waiting = list(batches)
    again = RolloutQueue(2, prompts)
    again.load(queue.tensors(), json.loads(json.dumps(queue.state())))
    assert repr(again.waiting) == repr(batches)
    assert again.waiting[0].groups[0].prompt is prompts[2]
    drawn: list[int] = []

    def draw(index: int) -> Sampled:
        drawn.append(index)
        return Sampled([], {"seconds/rollout": 1.0})

    assert again.next(5, draw).metrics == {"reward/errors": 1.0, "seconds/rollout": 1.0}
    assert drawn == [7]
