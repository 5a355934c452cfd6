"""The group as baseline, a whole step at a time: every pass has the gradient of the papers, with each option on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import (
    LENGTH,
    Exact,
    assert_gradient,
    before,
    exact,
    learner_of,
    rewards_of,
    sampled,
    stepped,
)
from torch import Tensor

from upslope.errors import DataError
from upslope.recipes.grpo import GRPO
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()
GROUP = 64


def prompts_of(x: Exact) -> Tensor:
    return torch.tensor([key[0] for key in x.keys])


def moments(x: Exact, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Bessel's deviation of a completion's group, [S] each."""
    means, deviations = [], []
    for g in (0, 1):
        n = x.weight_S * 2 * (prompts_of(x) == g)
        mean = (n * scores).sum()
        means.append(mean)
        deviations.append(((n * (scores - mean) ** 2).sum() * GROUP / (GROUP - 1)).sqrt())
    return torch.stack(means)[prompts_of(x)], torch.stack(deviations)[prompts_of(x)]


def advantages(x: Exact, kind: str, scores: Tensor | None = None) -> Tensor:
    """By the papers' definitions, [S, 1]."""
    scores = x.of(REWARDS) if scores is None else scores
    mean, deviation = moments(x, scores)
    if kind == "grpo":
        return ((scores - mean) / (deviation + 1e-4))[:, None]
    if kind == "rloo":
        others = (GROUP * mean - scores) / (GROUP - 1)
        return (scores - others)[:, None]
    centred = scores - mean
    if kind == "dr_grpo":
        return centred[:, None]
    variance = x.expected(centred**2) * 2 * GROUP / (2 * GROUP - 1)
    return (centred / (variance + 1e-8).sqrt())[:, None]


def aggregate(x: Exact, normalizer: str, loss_ST: Tensor) -> Tensor:
    if normalizer == "token":
        return x.token_mean(loss_ST)
    if normalizer == "sequence":
        return x.sequence_mean(loss_ST)
    return x.expected((loss_ST * x.mask_ST).sum(1)) / LENGTH


def clipped(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


@pytest.mark.parametrize("normalizer", ["token", "sequence", "constant"])
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_every_advantage_under_every_normalizer(advantage: str, normalizer: str, table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, advantage=advantage, normalizer=normalizer)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        assert_gradient(taken[0], aggregate(x, normalizer, -advantages(x, advantage) * x.logp_ST), named)
        if normalizer != "constant":
            return
        # what each advantage does to the gradient of the expected reward
        p, (_, deviation) = x.logp_ST.sum(1).exp() / 2, moments(x, x.of(REWARDS))
        everywhere = (x.expected((x.of(REWARDS) - moments(x, x.of(REWARDS))[0]) ** 2) * 128 / 127).sqrt()
        factor = {"grpo": 1 / deviation, "rloo": GROUP / (GROUP - 1), "reinforce++": 1 / everywhere}.get(advantage, 1.0)
        tolerance = {"grpo": 1e-3, "reinforce++": 1e-6}.get(advantage, 1e-9)
        objective = (p * factor * x.of(REWARDS)).sum() / LENGTH
        assert_gradient(taken[0], -objective, named, tolerance=tolerance)


PASSES: dict[str, dict[str, Any]] = {
    "clip": {"epsilon": 0.03},
    "clip higher": {"epsilon": 0.03, "epsilon_high": 0.08},
    "gspo": {"loss": "gspo", "epsilon": 0.01, "epsilon_high": 0.02},
    "cispo": {"loss": "cispo", "epsilon_high": 0.03},
    "sapo": {"loss": "sapo", "tau_positive": 2.0, "tau_negative": 3.0},
}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_of_every_loss(name: str, beta: float, table_model: Path) -> None:
    """Three passes over one batch: ratios are to what sampled; beta adds KL(pi || ref) at each state."""
    o = PASSES[name]
    learner = learner_of(GRPO, table_model, num_iterations=3, learning_rate=0.03, beta=beta, **o)
    taken, metrics = stepped(learner, sampled(REWARDS))
    assert len(taken) == metrics[0]["optimizer_steps"] == 3
    shares = []
    low, high = o.get("epsilon", 0.2), o.get("epsilon_high", o.get("epsilon", 0.2))
    normalizer = "sequence" if name in ("gspo", "sapo") else "token"
    with before(learner, taken[0]) as (x, _):
        old = x.logp_ST.detach()
    acted = 0.0
    for place, one in enumerate(taken):
        with before(learner, one) as (x, named):
            a, log_ratio = advantages(x, "grpo"), x.logp_ST - old
            ratio = log_ratio.exp()
            if name == "gspo":
                of_sequence = ((log_ratio * x.mask_ST).sum(1) / x.lengths_S).exp()[:, None]
                loss_ST = clipped(of_sequence, a, low, high).expand(x.mask_ST.shape)
                plain = -(of_sequence * a).expand(x.mask_ST.shape)
            elif name == "cispo":
                loss_ST = -ratio.clamp(max=1 + high).detach() * a * x.logp_ST
                plain = -ratio.detach() * a * x.logp_ST
            elif name == "sapo":
                tau = torch.where(a > 0, 2.0, 3.0)
                loss_ST, plain = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * a, -ratio * a
            else:
                loss_ST, plain = clipped(ratio, a, low, high), -ratio * a
            beyond = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
            shares.append(float(aggregate(x, normalizer, beyond.double())))
            acted = max(acted, float((loss_ST - plain).abs().max().detach()))
            loss = aggregate(x, normalizer, loss_ST)
            if beta:
                ref = exact(learner.reference.model)
                kl_ST = ratio * (x.logp_ST - ref.logp_ST.detach())
                kl = aggregate(x, normalizer, kl_ST)
                if place == 0 and normalizer == "token":  # over whole completions the sample's form is the exact one's
                    kl = x.token_mean(x.divergences(ref))
                loss = loss + beta * kl
            assert_gradient(one, loss, named)
    assert acted > 1e-3, "the clip must act"
    assert metrics[0]["policy/clipfrac"] == pytest.approx(sum(shares) / 3)


def test_kl_is_measured_per_completion(table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, beta=0.3)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, _):
        kl = x.expected(((x.logp_ST - exact(learner.reference.model).logp_ST) * x.mask_ST).sum(1))
        assert metrics["objective/kl"] == pytest.approx(float(kl.detach()))


def test_the_reference_under_adapters_is_the_model_without_them(table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, beta=0.3, lora_rank=2, rollout_correction="none")
    with learner.policy.as_reference() as model:
        ref_ST = exact(model).logp_ST.detach()
    for name, p in learner.policy.model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.5)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        assert (x.logp_ST - ref_ST).abs().max() > 0.1
        ratio = (x.logp_ST - x.logp_ST.detach()).exp()
        assert_gradient(
            taken[0], x.token_mean(-advantages(x, "grpo") * x.logp_ST + 0.3 * ratio * (x.logp_ST - ref_ST)), named
        )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_and_temperature(temperature: float, table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, entropy_coef=0.7, temperature=temperature)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=temperature) as (x, named):
        entropy = x.token_mean(x.entropies())
        assert metrics["policy/entropy"] == pytest.approx(float(entropy.detach()))
        assert_gradient(taken[0], -x.token_mean(advantages(x, "grpo") * x.logp_ST) - 0.7 * entropy, named)


def test_penalties_are_subtracted_once_before_the_comparison(table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, advantage="dr_grpo", missing_eos_penalty=0.7, overlong_buffer=2)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        scores = x.of(REWARDS) - torch.tensor([0.0, 0.5, 1.0])[x.lengths_S - 1] - 0.7 * x.cut_S
        assert_gradient(taken[0], -x.token_mean(advantages(x, "dr_grpo", scores) * x.logp_ST), named)


def test_masked_truncation_leaves_the_cut_completions_out_of_group_and_denominator(table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, advantage="dr_grpo", truncated="mask")
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        scores, kept = x.of(REWARDS), (~x.cut_S).double()
        means = []
        for g in (0, 1):
            n = x.weight_S * kept * (prompts_of(x) == g)
            means.append((n * scores).sum() / n.sum())
        a = scores - torch.stack(means)[prompts_of(x)]
        assert_gradient(taken[0], -x.token_mean(a[:, None] * x.logp_ST, kept), named)


@pytest.mark.parametrize("more", [{}, {"beta": 0.3}, {"entropy_coef": 0.7}], ids=str)
def test_completions_without_advantage_stay_in_the_denominator(more: dict[str, Any], table_model: Path) -> None:
    """They are left out of the passes only where nothing else in the loss could move them."""
    rewards = {key: 0.5 if key[0] == 1 else value for key, value in REWARDS.items()}
    learner = learner_of(GRPO, table_model, num_iterations=2, learning_rate=0.03, **more)
    taken, (metrics,) = stepped(learner, sampled(rewards))
    assert metrics["rollout/skipped"] == (0.0 if more else 0.5)
    with before(learner, taken[0]) as (x, _):
        old = x.logp_ST.detach()
    third = []
    for one in taken:
        with before(learner, one) as (x, named):
            ratio, moving = (x.logp_ST - old).exp(), prompts_of(x) == 0
            loss_ST = clipped(ratio, advantages(x, "grpo", x.of(rewards)) * moving[:, None], 0.2, 0.2)
            if "beta" in more:
                loss_ST = loss_ST + 0.3 * ratio * (x.logp_ST - exact(learner.reference.model).logp_ST.detach())
            if "entropy_coef" in more:
                loss_ST = loss_ST - 0.7 * x.entropies()
            assert_gradient(one, x.token_mean(loss_ST), named)
            counted = torch.ones(len(x.keys)) if more else moving
            third.append(float(x.token_mean(ratio - 1 - ratio.log(), counted).detach()))
    assert metrics["policy/approx_kl"] == pytest.approx(sum(third) / 2)  # over the tokens that the pass went through


def test_minibatches_are_whole_prompts_each_with_its_own_denominator(table_model: Path) -> None:
    learner = learner_of(GRPO, table_model, num_minibatches=2, num_iterations=2, learning_rate=0.0)
    taken, _ = stepped(learner, sampled(REWARDS))
    seen = []
    for one in taken:
        with before(learner, one) as (x, named):
            for g in (0, 1):
                loss = -x.token_mean(advantages(x, "grpo") * x.logp_ST, prompts_of(x) == g)
                (head,) = torch.autograd.grad(loss, named["lm_head.weight"], retain_graph=True)
                if torch.allclose(head, one.gradients["lm_head.weight"]):
                    seen.append(g)
                    assert_gradient(one, loss, named)
    assert sorted(seen[:2]) == sorted(seen[2:]) == [0, 1]


def test_dynamic_sampling_trains_on_groups_that_differ(table_model: Path) -> None:
    """Rounds of as many prompts as are still missing; the first that differ are kept, in their order."""

    def group(key: int, *values: float | None) -> RolloutGroup:
        rollouts = [
            Rollout([5], [1], [True], [0.0], [0.0], "stop", "", i, reward=Reward(v)) for i, v in enumerate(values)
        ]
        return RolloutGroup(Prompt(key=key, text=""), rollouts)

    def drawn(rounds: list[list[RolloutGroup]], limit: int) -> tuple[list[int], float, list[tuple[int, int]]]:
        learner = learner_of(GRPO, table_model, dynamic_sampling=True, dynamic_sampling_rounds=limit)
        asked: list[tuple[int, int]] = []

        def sample(step: int, *, round_: int = 0, count: int | None = None) -> Any:
            asked.append((round_, count or learner.options.num_prompts))
            return rounds[round_], {"reward/errors": 1.0}

        learner.sampler.sample = sample
        sampled = learner.sampler.draw(0)
        assert sampled.metrics["reward/errors"] == len(asked)
        return [g.prompt.key for g in sampled.groups], sampled.metrics["rollout/prompts_tried"], asked

    same, third = group(0, 0.1, 0.1, 0.1), group(2, 0.3, None, 0.3)
    rounds = [[same, group(1, 0.0, 1.0)], [third], [group(3, 1.0, 1.0)], [group(4, 1.0, None, 0.0)]]
    assert drawn(rounds, 4) == ([1, 4], 5.0, [(0, 2), (1, 1), (2, 1), (3, 1)])
    with pytest.raises(DataError, match="4 prompts in 3 rounds gave 1 groups"):
        drawn(rounds, 3)


def test_dynamic_sampling_goes_by_what_is_compared(table_model: Path) -> None:
    """Rewards with their penalties, of the completions that will be trained on."""

    def signal(rewards: list[tuple[float | None, str]], **options: Any) -> bool:
        learner = learner_of(GRPO, table_model, dynamic_sampling=True, **options)

        def one(value: float | None, done: Any) -> Rollout:
            return Rollout([5], [7, 8], [True, True], [0.0] * 2, [0.0] * 2, done, "", 0, reward=Reward(value))

        group = RolloutGroup(Prompt(key=0, text=""), [one(*each) for each in rewards])
        learner.sampler.sample = lambda step, **_: ([group, group], {})
        try:
            return len(learner.sampler.draw(0).groups) == 2
        except DataError:
            return False

    assert not signal([(1.0, "stop"), (1.0, "stop"), (0.0, "length")], truncated="mask")
    assert signal([(1.0, "stop"), (0.0, "stop"), (0.0, "length")], truncated="mask")
    assert not signal([(1.0, "length"), (0.0, "length")], truncated="mask")
    assert not signal([(None, "stop"), (None, "stop")])
    assert signal([(0.0, "stop"), (0.0, "length")], missing_eos_penalty=0.5)
    assert not signal([(0.0, "stop"), (0.0, "length")])
