"""Options that meet in one step: what each of them does alone must also be what it does beside the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import (
    EOS,
    LENGTH,
    OTHER,
    TABLE,
    A,
    Exact,
    assert_gradient,
    before,
    exact,
    learner_of,
    rewards_of,
    sampled,
    stepped,
    watch,
)
from test_exact_grpo import advantages, aggregate, clipped, prompts_of
from test_exact_ppo import surrogate
from torch import Tensor

from upslope.models.files.weights import load as load_weights
from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import PPO
from upslope.recipes.reinforce import Reinforce
from upslope.types import Reward, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()


def gspo(x: Exact, log_ratio: Tensor, a: Tensor) -> Tensor:
    whole = ((log_ratio * x.mask_ST).sum(1) / x.lengths_S).exp()[:, None]
    return clipped(whole, a, 0.01, 0.02).expand(x.mask_ST.shape)


LOSSES: dict[str, Callable[[Exact, Tensor, Tensor], Tensor]] = {
    "clipped": lambda x, log_ratio, a: clipped(log_ratio.exp(), a, 0.01, 0.02),
    "gspo": gspo,
    "cispo": lambda x, log_ratio, a: -log_ratio.exp().clamp(max=1.02).detach() * a * x.logp_ST,
    "sapo": lambda x, log_ratio, a: (
        -4 / torch.where(a > 0, 1.0, 1.05) * torch.sigmoid(torch.where(a > 0, 1.0, 1.05) * (log_ratio.exp() - 1)) * a
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_correction_weighs_every_policy_loss_and_nothing_else(loss: str, table_model: Path) -> None:
    """Stale rollouts, two passes, KL and entropy: the two are at the states that were sampled, as they are."""
    o: dict[str, Any] = {"loss": loss, "num_iterations": 2, "learning_rate": 0.03, "beta": 0.3, "entropy_coef": 0.7}
    learner = learner_of(
        GRPO, table_model, epsilon=0.01, epsilon_high=0.02, rollout_lag=1, rollout_correction_cap=1.3, **o
    )
    taken, _ = stepped(learner, sampled(REWARDS, table=OTHER))
    ref_ST = exact(learner.reference.model).logp_ST.detach()
    with before(learner, taken[0], table=OTHER) as (x, _):
        old, weight = x.logp_ST.detach(), x.importance(OTHER, "token", 1.3)
    for one in taken:
        with before(learner, one, table=OTHER) as (x, named):
            log_ratio = x.logp_ST - old
            loss_ST = weight * LOSSES[loss](x, log_ratio, advantages(x, "grpo"))
            loss_ST = loss_ST + 0.3 * log_ratio.exp() * (x.logp_ST - ref_ST) - 0.7 * x.entropies()
            assert_gradient(one, aggregate(x, "sequence" if loss in ("gspo", "sapo") else "token", loss_ST), named)


def test_everything_of_ppo_over_stale_rollouts(table_model: Path) -> None:
    o: dict[str, Any] = {"num_epochs": 2, "learning_rate": 0.03, "kl_coef": 0.3, "kl_placement": "loss", "vf_coef": 0.4}
    o |= {"rollout_kl_coef": 0.6, "entropy_coef": 0.7, "rollout_correction_cap": 1.3, "lam": 0.6, "dual_clip": 1.5}
    learner = learner_of(PPO, table_model, rollout_lag=1, **o)
    taken, (metrics,) = stepped(learner, sampled(REWARDS, table=OTHER))
    ref_ST, losses = exact(learner.reference.model).logp_ST.detach(), []
    for place, one in enumerate(taken):
        with before(learner, one, table=OTHER) as (x, named):
            v = x.values(learner.critic.network.head)[0]
            if place == 0:
                old, weight, target = x.logp_ST.detach(), x.importance(OTHER, "token", 1.3), v.detach()
                a = x.gae(x.last(x.of(REWARDS)), v.detach(), gamma=1.0, lam=0.6)
                target, a = a + v.detach(), x.whitened(a)
            log_ratio = x.logp_ST - old
            policy_ST = weight * surrogate(log_ratio.exp(), a, dual=1.5)
            kl_ST = 0.3 * log_ratio.exp() * (x.logp_ST - ref_ST) + 0.6 * (log_ratio.exp() - 1 - log_ratio)
            loss_ST = policy_ST + kl_ST + 0.4 * 0.5 * (v - target) ** 2 - 0.7 * x.entropies()
            assert_gradient(one, x.token_mean(loss_ST), named)
            losses.append((float(x.token_mean(policy_ST).detach()), float(x.token_mean(loss_ST).detach())))
    assert metrics["loss/policy"] == pytest.approx(sum(x for x, _ in losses) / 2)
    assert metrics["loss"] == pytest.approx(sum(x for _, x in losses) / 2)


@pytest.mark.parametrize("make", [PPO, GRPO, Reinforce])
def test_the_reference_under_adapters_has_the_temperature(make: Any, table_model: Path) -> None:
    o = {"beta": 0.3} if make is GRPO else {"kl_coef": 0.3}
    learner = learner_of(make, table_model, temperature=2.0, lora_rank=2, rollout_lag=1, **o)
    with learner.policy.as_reference() as model:
        ref_ST = exact(model, temperature=2.0).logp_ST.detach()
    for name, p in learner.policy.model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.5)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=2.0) as (x, _):
        kl = x.expected(((x.logp_ST - ref_ST) * x.mask_ST).sum(1))
    assert metrics["objective/kl"] == pytest.approx(float(kl.detach()))


@pytest.mark.parametrize("make", [PPO, GRPO, Reinforce])
def test_the_reference_is_the_policy_that_was_handed_over(make: Any, table_model: Path) -> None:
    """Not what lies in its folder: a run may go on from weights in memory."""
    from upslope.build import load_reference

    learner = learner_of(make, table_model, **({"beta": 0.3} if make is GRPO else {"kl_coef": 0.3}))
    reference = load_reference(learner.policy, learner.options)
    assert reference is not None
    stored = load_weights(learner.policy.folder, torch.float32)
    for name, weight in reference.named_parameters():
        assert torch.equal(weight, learner.policy.model.get_parameter(name))
        assert not weight.requires_grad
    assert not torch.equal(reference.get_parameter("lm_head.weight").float(), stored["lm_head.weight"])


def some_failed(table: Any = TABLE) -> list[RolloutGroup]:
    """The first prompt's shortest completions could not be judged."""
    groups = sampled(REWARDS, table=table)
    for rollout in groups[0].rollouts:
        if rollout.tokens in ([EOS], [A, EOS]):
            rollout.reward = Reward(value=None, error="no idea")
    return groups


@pytest.mark.parametrize("why", ["not judged", "cut"])
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo", "reinforce++"])
def test_groups_are_compared_among_those_trained_on(advantage: str, why: str, table_model: Path) -> None:
    """What was not judged, or is masked, is in no mean, no deviation, no number of others and no denominator."""
    learner = learner_of(GRPO, table_model, advantage=advantage, truncated="mask" if why == "cut" else "terminate")
    taken, (metrics,) = stepped(learner, sampled(REWARDS) if why == "cut" else some_failed())
    with before(learner, taken[0]) as (x, named):
        failed = torch.tensor([key in ((0, (EOS,)), (0, (A, EOS))) for key in x.keys])
        kept, scores = ~x.cut_S if why == "cut" else ~failed, x.of(REWARDS)
        n_S = x.weight_S * 128 * kept
        a, centred = torch.zeros(len(kept)), torch.zeros(len(kept))
        for g in (0, 1):
            own = prompts_of(x) == g
            n, total = n_S * own, (n_S * own).sum()
            mean = (n * scores).sum() / total
            deviation = ((n * (scores - mean) ** 2).sum() / (total - 1)).sqrt()
            each = {"grpo": (scores - mean) / (deviation + 1e-4), "rloo": (scores - mean) * total / (total - 1)}
            a = torch.where(own, each.get(advantage, scores - mean), a)
            centred = torch.where(own, scores - mean, centred)
        if advantage == "reinforce++":
            a = centred / ((n_S * centred**2).sum() / (n_S.sum() - 1) + 1e-8).sqrt()
        assert_gradient(taken[0], -x.token_mean(a[:, None] * x.logp_ST, kept), named)
    assert metrics["rollout/left_out"] == pytest.approx(128 - float(n_S.sum()))
    assert metrics["num_tokens"] == pytest.approx(float((n_S * x.lengths_S).sum()))


def test_the_controller_counts_those_that_its_kl_was_measured_on(table_model: Path) -> None:
    learner = learner_of(Reinforce, table_model, baseline="none", kl_coef=0.3, kl_target=1e-3, kl_horizon=640)
    stepped(learner, groups := some_failed())
    judged = sum(r.reward.value is not None for g in groups for r in g.rollouts)
    assert judged < 128
    assert learner.reference.controller.coef == pytest.approx(0.3 * (1 + 0.2 * judged / 640))


def test_the_moving_baseline_is_of_rewards_with_their_kl(table_model: Path) -> None:
    learner = learner_of(
        Reinforce, table_model, baseline="moving", kl_coef=0.3, missing_eos_penalty=0.7, learning_rate=0.0
    )
    taken, metrics = stepped(learner, sampled(REWARDS), steps=2)
    with before(learner, taken[0]) as (x, _):
        kl_S = ((x.logp_ST - exact(learner.reference.model).logp_ST) * x.mask_ST).sum(1).detach()
        mean = x.expected(x.of(REWARDS) - 0.7 * x.cut_S - 0.3 * kl_S)
    assert [m["baseline"] for m in metrics] == pytest.approx([0.0, float(mean)])


def test_the_constant_is_the_budget_and_not_the_longest_completion(table_model: Path) -> None:
    for make, o in ((Reinforce, {"baseline": "none"}), (GRPO, {"advantage": "dr_grpo"})):
        learner = learner_of(make, table_model, normalizer="constant", max_completion_length=LENGTH + 2, **o)
        taken, _ = stepped(learner, sampled(REWARDS))
        with before(learner, taken[0]) as (x, named):
            p = x.logp_ST.sum(1).exp() / 2
            assert_gradient(taken[0], -(p * x.of(REWARDS)).sum() / (LENGTH + 2), named)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_critic_decays_and_is_clipped_as_its_options_say(critic: str, table_model: Path) -> None:
    """Apart: its matrices decay and its own gradient is clipped. Shared: the head does neither by itself."""
    learner = learner_of(PPO, table_model, critic=critic, num_epochs=1, weight_decay=0.5, max_grad_norm=0.01)
    optimizer = learner.critic.optimizer or learner.optimizer
    head = learner.critic.network.head.score.weight
    head.data[0, 7] = 3.0  # no state of the batch has this place: it has no gradient
    taken = watch(optimizer)
    _, (metrics,) = stepped(learner, sampled(REWARDS))
    if critic == "shared":
        assert float(head[0, 7]) == 3.0
        return
    assert taken[0].gradients["critic.score.weight"][0, 7] == 0
    assert float(head[0, 7]) == pytest.approx(3.0 * (1 - 0.1 * 0.5))
    moments = {k.removesuffix("|exp_avg"): 10 * m for k, m in optimizer.state().items() if k.endswith("|exp_avg")}
    clipped_norm = float(torch.cat([m.flatten() for m in moments.values()]).norm())
    whole = float(torch.cat([g.flatten() for g in taken[0].gradients.values()]).norm())
    assert whole > 0.05
    assert clipped_norm == pytest.approx(0.01)
    assert metrics["critic_grad_norm"] == pytest.approx(whole)


def test_a_critic_apart_follows_the_schedule(table_model: Path) -> None:
    o: dict[str, Any] = {"learning_rate": 0.04, "lr_scheduler_type": "linear", "max_steps": 4, "num_epochs": 1}
    learner = learner_of(PPO, table_model, critic="separate", **o)
    apart = watch(learner.critic.optimizer)
    stepped(learner, sampled(REWARDS), steps=4)
    assert [one.learning_rate for one in apart] == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_a_narrow_critic_apart_starts_from_weights_as_they_were(tiny: Path) -> None:
    from upslope.build import load_policy
    from upslope.options import PPOOptions

    options = PPOOptions(model=str(tiny), dtype="bfloat16", critic="separate", num_train_prompts=4, eval_samples=0)
    learner = PPO(options, load_policy(options))
    stored, masters = load_weights(tiny, torch.float32), learner.critic.optimizer.weights()  # type: ignore[union-attr]
    assert next(learner.critic.network.model.parameters()).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert all(torch.equal(masters[f"critic.{name}"], w) for name, w in stored.items())


@pytest.mark.parametrize("make", [PPO, GRPO])
def test_minibatches_are_drawn_anew_and_rates_go_by_steps(make: Any, table_model: Path) -> None:
    passes = {"num_epochs": 2} if make is PPO else {"num_iterations": 2}
    o: dict[str, Any] = {"learning_rate": 1e-9, "lr_scheduler_type": "linear", "max_steps": 6, "num_minibatches": 2}
    learner = learner_of(make, table_model, **o, **passes)
    taken, _ = stepped(learner, sampled(REWARDS), steps=6)
    assert [one.learning_rate * 6e9 for one in taken] == pytest.approx([6 - i // 4 for i in range(24)])
    heads = [one.gradients["lm_head.weight"] for one in taken]
    orders = [tuple(float((heads[i + j] - heads[0]).abs().max()) < 1e-6 for j in range(4)) for i in range(0, 24, 4)]
    assert len(set(orders)) > 1, "the passes of every step are in one order"
    assert len({order[:2] for order in orders} | {order[2:] for order in orders}) > 1


@pytest.mark.parametrize("passes", [{"num_epochs": 3}, {"num_minibatches": 2, "num_epochs": 1}], ids=str)
def test_value_pretraining_takes_every_pass_and_heeds_no_target_kl(passes: dict[str, Any], table_model: Path) -> None:
    learner = learner_of(PPO, table_model, value_pretraining_steps=1, target_kl=1e-9, **passes)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    assert metrics["optimizer_steps"] == len(taken) == (3 if "num_minibatches" not in passes else 2)
    assert all(set(one.gradients) == {"critic.score.weight", "critic.score.bias"} for one in taken)


def test_greedy_replies_that_were_cut_are_still_baselines(table_model: Path) -> None:
    from test_exact_reinforce import greedy_replies

    learner = learner_of(Reinforce, table_model, baseline="greedy", truncated="mask")
    greedy = greedy_replies()
    greedy[1].rollouts[0].finish_reason = "length"
    _, (metrics,) = stepped(learner, groups := sampled(REWARDS), greedy=greedy)
    ended = [sum(r.finish_reason == "stop" for r in g.rollouts) for g in groups]
    assert metrics["baseline"] == pytest.approx((0.5 * ended[0] + 1.5 * ended[1]) / sum(ended))


def test_what_a_step_says_of_itself(table_model: Path) -> None:
    """Metrics by their definitions, over the step's tokens and completions."""
    o: dict[str, Any] = {"num_epochs": 2, "learning_rate": 0.03, "truncated": "bootstrap", "gamma": 0.9}
    learner, groups = learner_of(PPO, table_model, rollout_lag=1, **o), some_failed(OTHER)
    taken, (m,) = stepped(learner, groups)
    with before(learner, taken[0], table=OTHER) as (x, _):
        failed = torch.tensor([key in ((0, (EOS,)), (0, (A, EOS))) for key in x.keys])
        n_S = x.weight_S * 128 * ~failed
        n_ST = n_S[:, None] * x.mask_ST
        gap = (x.logps(OTHER) - x.logp_ST.detach()).abs()
        assert m["rollout/max_logprob_diff"] == pytest.approx(float(gap[x.mask_ST].max()))
        assert m["rollout/mean_logprob_diff"] == pytest.approx(float((n_ST * gap).sum() / n_ST.sum()))
        assert m["objective/entropy"] == pytest.approx(-float((n_ST * x.logp_ST.detach()).sum() / n_ST.sum()))
        v, final_S = (y.detach() for y in x.values(learner.critic.network.head))
        scores = x.last(x.of(REWARDS)) + 0.9 * x.last(torch.where(x.cut_S, final_S, 0.0))
        returns = x.to_go(scores, 0.9)

        def variance(y: Tensor) -> Tensor:
            mean = (n_ST * y).sum() / n_ST.sum()
            return (n_ST * (y - mean) ** 2).sum()

        explained = 1 - float(variance(returns - v) / variance(returns))
        assert m["val/explained_variance"] == pytest.approx(explained)
        old = x.logp_ST.detach()
    with before(learner, taken[1], table=OTHER) as (x, _):
        log_ratio = (x.logp_ST - old).detach()
        k3 = (n_ST * (log_ratio.exp() - 1 - log_ratio)).sum() / n_ST.sum()
        assert m["policy/approx_kl"] == pytest.approx(float(k3) / 2)  # of the first pass it is 0
    everyone = [r for g in groups for r in g.rollouts]
    assert m["completions/clipped_ratio"] == sum(r.finish_reason == "length" for r in everyone) / 128
    assert m["completions/mean_length"] == sum(len(r.tokens) for r in everyone) / 128
    assert m["num_tokens"] == pytest.approx(float(n_ST.sum()))
    assert learner.step(1).tokens == pytest.approx(float(n_ST.sum()))
    judged = [r.reward.value for r in everyone if r.reward.value is not None]
    assert m["reward"] == pytest.approx(sum(judged) / len(judged))
