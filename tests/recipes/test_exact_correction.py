"""Rollouts of other weights, or through a filter: every recipe's whole step with each importance weight and its cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import LENGTH, OTHER, TABLE, Exact, assert_gradient, before, learner_of, rewards_of, sampled, stepped
from torch import Tensor

from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import PPO
from upslope.recipes.reinforce import Reinforce

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "reinforce": (Reinforce, {"baseline": "none", "normalizer": "constant"}),
    "ppo": (PPO, {"num_epochs": 1, "whiten_advantages": False, "vf_coef": 0.0, "lam": 1.0}),
    "grpo": (GRPO, {"advantage": "dr_grpo", "normalizer": "constant"}),
}


def objective(name: str, x: Exact, learner: Any, weight_ST: Tensor) -> Tensor:
    """Of the batch that the other weights sampled, as the recipe without correction has it, each token weighted."""
    scores = x.of(REWARDS)
    if name == "ppo":
        advantages = x.to_go(x.last(scores)) - x.values(learner.critic.network.head)[0].detach()
        return -x.token_mean(weight_ST * advantages * x.logp_ST)
    if name == "grpo":
        prompts = torch.tensor([key[0] for key in x.keys])
        means = [2 * x.expected(scores * (prompts == g)) for g in (0, 1)]
        scores = scores - torch.stack(means)[prompts]
    return -x.expected((weight_ST * scores[:, None] * x.logp_ST * x.mask_ST).sum(1)) / LENGTH


def policy_of(named: dict[str, Any]) -> dict[str, Any]:
    return {name: p for name, p in named.items() if not name.startswith("critic")}


LEVELS = ("none", "auto", "token", "sequence", "geometric")
CASES = [("older weights", level) for level in LEVELS] + [("filter", level) for level in LEVELS[2:]]


@pytest.mark.parametrize("cap", [1.2, 1e6])
@pytest.mark.parametrize(("sampler", "level"), CASES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_level_and_its_cap(name: str, sampler: str, level: str, cap: float, table_model: Path) -> None:
    """older weights: log-probs are recomputed; filter: the policy's are known, and the sampled distribution's."""
    make, options = RECIPES[name]
    stale = sampler == "older weights"
    learner = learner_of(
        make,
        table_model,
        rollout_correction=level,
        rollout_correction_cap=cap,
        **{"rollout_lag": 1} if stale else {"top_k": 2},
        **options,
    )
    groups = sampled(REWARDS, table=OTHER, policy=None if stale else TABLE)
    taken, (metrics,) = stepped(learner, groups)
    with before(learner, taken[0], table=OTHER) as (x, named):
        chosen = x.importance(OTHER, "token" if level == "auto" else level, cap)
        chosen = torch.ones(chosen.shape) if level == "none" else chosen
        assert cap > 2 or level == "none" or bool((chosen == cap).any()), "the cap must act"
        assert_gradient(taken[0], objective(name, x, learner, chosen), policy_of(named))
        if level != "none":
            assert metrics["rollout/importance_mean"] == pytest.approx(float(x.token_mean(chosen)))
    if level == "sequence" and cap > 2 and name == "reinforce":
        with before(learner, taken[0]) as (x, named):
            exact_objective = (x.logp_ST.sum(1).exp() / 2 * x.of(REWARDS)).sum() / LENGTH
            assert_gradient(taken[0], -exact_objective, named)


@pytest.mark.parametrize("name", RECIPES)
def test_recomputed_log_probs_have_the_temperature(name: str, table_model: Path) -> None:
    make, options = RECIPES[name]
    learner = learner_of(make, table_model, rollout_lag=1, temperature=2.0, **options)
    _, (metrics,) = stepped(learner, sampled(REWARDS))
    assert metrics["rollout/max_logprob_diff"] < 1e-12
