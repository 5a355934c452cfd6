"""REINFORCE, a whole step at a time: its gradient is that of the exact objective, with each option on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import (
    EOS,
    LENGTH,
    A,
    Exact,
    assert_gradient,
    before,
    critic_before,
    estimated,
    exact,
    learner_of,
    rewards_of,
    sampled,
    stepped,
    watch,
)
from torch import Tensor

from upslope.loop import sampler as sampler_module
from upslope.recipes.reinforce import Reinforce
from upslope.rollout import collect
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()
STEPS = {(g, tokens): [(0, 0.5 + g)] + [(1, -1.5)] * (A in tokens[:1] and len(tokens) > 1) for g, tokens in REWARDS}
"""Rewards of single tokens; the rest of a completion's reward comes at its end."""


def probabilities(x: Exact) -> Tensor:
    """Of each completion under the policy itself, with its gradient; the prompts equally likely."""
    return x.logp_ST.sum(1).exp() / 2


def greedy_replies() -> list[RolloutGroup]:
    def reply(value: float) -> Rollout:
        return Rollout([5], [EOS], [True], [0.0], [0.0], "stop", "", 0, reward=Reward(value))

    return [RolloutGroup(Prompt(key=g, text=""), [reply(g + 0.5)]) for g in (0, 1)]


@pytest.mark.parametrize(
    ("baseline", "more"),
    [
        ("none", {}),
        ("moving", {"baseline_decay": 0.5}),
        ("greedy", {}),
        ("learned", {"vf_coef": 0.0}),
        ("learned", {"critic": "separate"}),
    ],
    ids=lambda x: str(x),
)
def test_every_baseline_has_the_gradient_of_the_expected_reward(
    baseline: str, more: dict[str, Any], table_model: Path
) -> None:
    """Over all completions, as often as they are likely: dJ, whatever is subtracted; in a second step, too."""
    learner = learner_of(Reinforce, table_model, baseline=baseline, normalizer="constant", learning_rate=0.0, **more)
    greedy = greedy_replies() if baseline == "greedy" else ()
    taken, _ = stepped(learner, sampled(REWARDS), greedy=greedy, steps=2 if baseline == "moving" else 1)
    with before(learner, taken[-1]) as (x, named):
        own = {name: p for name, p in named.items() if not name.startswith("critic")}
        assert_gradient(taken[-1], -(probabilities(x) * x.of(REWARDS)).sum() / LENGTH, own)


@pytest.mark.parametrize(
    "options", [{"baseline": "reinforce++"}, {"baseline": "none", "whiten_advantages": True}], ids=str
)
def test_whitening_divides_that_gradient_by_the_deviation_of_the_returns(
    options: dict[str, Any], table_model: Path
) -> None:
    learner = learner_of(Reinforce, table_model, **options)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        returns = x.to_go(x.last(x.of(REWARDS)))
        assert_gradient(taken[0], -x.token_mean(x.whitened(returns) * x.logp_ST), named)


@pytest.mark.parametrize("normalizer", ["token", "constant"])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_step_rewards_count_from_their_token_on(gamma: float, normalizer: str, table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="none", gamma=gamma, normalizer=normalizer)
    taken, _ = stepped(learner, sampled(REWARDS, steps=STEPS))
    with before(learner, taken[0]) as (x, named):
        rewards = torch.zeros(x.mask_ST.shape)
        for s, key in enumerate(x.keys):
            for t, value in STEPS[key]:
                rewards[s, t] += value
        rewards += x.last(x.of(REWARDS) - rewards.sum(1))
        loss_ST = -x.to_go(rewards, gamma) * x.logp_ST
        loss = x.token_mean(loss_ST) if normalizer == "token" else x.expected((loss_ST * x.mask_ST).sum(1)) / LENGTH
        assert_gradient(taken[0], loss, named)
        if gamma == 1 and normalizer == "constant":
            assert_gradient(taken[0], -(probabilities(x) * x.of(REWARDS)).sum() / LENGTH, named)


def test_kl_in_the_reward_is_subtracted_from_the_objective(table_model: Path) -> None:
    """The exact gradient of J - kl_coef KL(pi || ref), the KL of whole completions (k1 with returns to go)."""
    learner = learner_of(Reinforce, table_model, baseline="none", normalizer="constant", kl_coef=0.3)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        p, ref_ST = probabilities(x), exact(learner.reference.model).logp_ST.detach()
        kl = (p * (x.logp_ST - ref_ST).sum(1)).sum()
        measured = float(kl.detach())
        assert_gradient(taken[0], -((p * x.of(REWARDS)).sum() - 0.3 * kl) / LENGTH, named)
    assert metrics["objective/kl"] == pytest.approx(measured)
    assert metrics["objective/kl_coef"] == 0.3


def test_the_reference_under_adapters_is_the_model_without_them(table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="none", kl_coef=0.3, lora_rank=2, rollout_correction="none")
    assert learner.reference.model is None
    with learner.policy.as_reference() as model:
        ref_ST = exact(model).logp_ST.detach()
    for name, p in learner.policy.model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.5)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        assert (x.logp_ST - ref_ST).abs().max() > 0.1
        assert named
        assert all("lora" in name for name in named)
        rewards = x.last(x.of(REWARDS)) - 0.3 * (x.logp_ST - ref_ST).detach()
        assert_gradient(taken[0], -x.token_mean(x.to_go(rewards) * x.logp_ST), named)


def test_the_kl_coefficient_adapts_once_a_step_by_the_kl_of_whole_completions(table_model: Path) -> None:
    """coef (1 + clip(KL / target - 1, -0.2, 0.2) completions / horizon), from the step after on (arXiv 1909.08593)."""
    common: dict[str, Any] = {"baseline": "none", "learning_rate": 0.0, "kl_coef": 0.3, "kl_horizon": 640}
    for target, change in ((1e-3, 0.2), (1e3, -0.2), (None, 0.0)):
        learner = learner_of(Reinforce, table_model, kl_target=target, **common)
        taken, metrics = stepped(learner, sampled(REWARDS), steps=2)
        expected = 0.3 * (1 + change * 128 / 640)
        assert [m["objective/kl_coef"] for m in metrics] == pytest.approx([0.3, expected])
        for one, coef in zip(taken, (0.3, expected), strict=True):
            with before(learner, one) as (x, named):
                ref_ST = exact(learner.reference.model).logp_ST.detach()
                rewards = x.last(x.of(REWARDS)) - coef * (x.logp_ST - ref_ST).detach()
                assert_gradient(one, -x.token_mean(x.to_go(rewards) * x.logp_ST), named)
    with before(learner, taken[0]) as (x, _):
        kl = float(x.expected(((x.logp_ST - exact(learner.reference.model).logp_ST) * x.mask_ST).sum(1)).detach())
    near = learner_of(Reinforce, table_model, kl_target=0.9 * kl, **common)
    _, metrics = stepped(near, sampled(REWARDS), steps=2)
    assert metrics[1]["objective/kl_coef"] == pytest.approx(0.3 * (1 + (1 / 0.9 - 1) * 128 / 640))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_is_a_bonus_at_the_states_visited(temperature: float, table_model: Path) -> None:
    """- entropy_coef mean_t H(pi(. | s_t)) of the distribution that is sampled from, the states held constant."""
    learner = learner_of(Reinforce, table_model, baseline="none", entropy_coef=0.7, temperature=temperature)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=temperature) as (x, named):
        returns = x.to_go(x.last(x.of(REWARDS)))
        entropy = x.token_mean(x.entropies())
        measured = float(entropy.detach())
        assert_gradient(taken[0], -x.token_mean(returns * x.logp_ST) - 0.7 * entropy, named)
    assert metrics["policy/entropy"] == pytest.approx(measured)


def test_temperature_is_part_of_the_policy(table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="none", normalizer="constant", temperature=2.0)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=2.0) as (x, named):
        assert_gradient(taken[0], -(probabilities(x) * x.of(REWARDS)).sum() / LENGTH, named)


PENALTIES: dict[str, tuple[dict[str, Any], dict[int, float], float]] = {
    "missing eos": ({"missing_eos_penalty": 0.7}, {}, 0.7),
    "overlong": ({"overlong_buffer": 2}, {1: 0.0, 2: 0.5, 3: 1.0}, 0.0),
    "both": ({"missing_eos_penalty": 0.7, "overlong_buffer": 2}, {1: 0.0, 2: 0.5, 3: 1.0}, 0.7),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_subtracted_once_from_the_reward(name: str, table_model: Path) -> None:
    options, by_length, cut = PENALTIES[name]
    learner = learner_of(Reinforce, table_model, baseline="none", normalizer="constant", **options)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        overlong = torch.tensor([by_length.get(int(n), 0.0) for n in x.lengths_S])
        rewards = x.of(REWARDS) - overlong - cut * x.cut_S
        assert_gradient(taken[0], -(probabilities(x) * rewards).sum() / LENGTH, named)
    if cut:
        assert metrics["rewards/missing_eos"] == pytest.approx(-cut * float(x.expected(x.cut_S.double())))
    if by_length:
        assert metrics["rewards/overlong"] == pytest.approx(-float(x.expected(overlong)))


def test_masked_truncation_leaves_the_cut_completions_out_of_loss_and_denominator(table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="none", truncated="mask")
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        returns = x.to_go(x.last(x.of(REWARDS)))
        assert_gradient(taken[0], -x.token_mean(returns * x.logp_ST, ~x.cut_S), named)
    assert metrics["rollout/left_out"] == pytest.approx(128 * float(x.expected(x.cut_S.double())))


@pytest.mark.parametrize("truncated", ["terminate", "bootstrap"])
@pytest.mark.parametrize(("critic", "whiten"), [("shared", False), ("shared", True), ("separate", False)])
def test_actor_critic(critic: str, whiten: bool, truncated: str, table_model: Path) -> None:
    """GAE by its definition; V of the state after a completion that was cut, and of none that ended."""
    o: dict[str, Any] = {"critic": critic, "truncated": truncated, "whiten_advantages": whiten}
    learner = learner_of(Reinforce, table_model, baseline="learned", gamma=0.9, lam=0.6, vf_coef=0.3, **o)
    apart = watch(learner.critic.optimizer) if critic == "separate" else []
    taken, _ = stepped(learner, sampled(REWARDS))
    with ExitStack() as stack:
        x, named = stack.enter_context(before(learner, taken[0]))
        c, its_own = stack.enter_context(critic_before(learner, apart[0])) if apart else (x, {})
        v_ST, final_S = c.values(learner.critic.network.head)
        after = torch.where(x.cut_S, final_S, 0.0).detach() if truncated == "bootstrap" else 0.0
        a_ST = x.gae(x.last(x.of(REWARDS)), v_ST.detach(), gamma=0.9, lam=0.6, after_S=after)
        policy = -x.token_mean((x.whitened(a_ST) if whiten else a_ST) * x.logp_ST)
        value = x.token_mean(0.5 * (v_ST - a_ST - v_ST.detach()) ** 2)
        if apart:
            assert_gradient(apart[0], value, its_own)
            assert_gradient(taken[0], policy, named)
        else:
            assert_gradient(taken[0], policy + 0.3 * value, named)


def test_without_vf_coef_the_head_alone_learns_the_value_at_full_weight(table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="learned", gamma=0.9, lam=0.6, vf_coef=0.0)
    taken, _ = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0]) as (x, named):
        head = {name: p for name, p in named.items() if name.startswith("critic")}
        v_ST, _ = x.values(learner.critic.network.head)
        a_ST = x.gae(x.last(x.of(REWARDS)), v_ST.detach(), gamma=0.9, lam=0.6, after_S=0.0)
        assert_gradient(taken[0], x.token_mean(0.5 * (v_ST - a_ST - v_ST.detach()) ** 2), head)
        trunk = {name: p for name, p in named.items() if name not in head}
        assert_gradient(taken[0], -x.token_mean(a_ST * x.logp_ST), trunk)


def test_the_greedy_baseline_is_that_of_the_prompt(table_model: Path) -> None:
    """R(y) - R(greedy reply to the same prompt), both with their penalties."""
    learner = learner_of(Reinforce, table_model, baseline="greedy", missing_eos_penalty=0.7)
    greedy = greedy_replies()
    greedy[1].rollouts[0].finish_reason = "length"
    groups = sampled(REWARDS)
    experience, metrics = estimated(learner, groups, greedy)
    for i, rollout in enumerate(experience.rollouts):
        value = rollout.reward.value - 0.7 * (rollout.finish_reason == "length")
        baseline = (0.5, 1.5 - 0.7)[experience.group_B[i]]
        assert rollout.reward.value is not None
        assert float(experience.padded(experience.advantages)[i, 0]) == pytest.approx(value - baseline)
    assert metrics["baseline"] == pytest.approx((0.5 + 0.8) / 2)


def test_the_greedy_reply_is_greedy(table_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def spy(engine: Any, tokenizer: Any, judge: Any, prompts: Any, params: Any) -> Any:
        asked.append((prompts, params))
        return collect(engine, tokenizer, judge, prompts, params)

    monkeypatch.setattr(sampler_module, "collect", spy)
    learner = learner_of(Reinforce, table_model, baseline="greedy", temperature=2.0, num_generations=2)
    drawn = learner.sampler.draw(0)
    _, (prompts, params) = asked
    assert (params.temperature, params.n, params.max_tokens) == (0.0, 1, LENGTH)
    assert [g.prompt for g in drawn.groups] == prompts == [g.prompt for g in drawn.greedy]
