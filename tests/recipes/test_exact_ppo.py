"""PPO, a whole step at a time: the gradient of every pass is that of the paper's objective, with each option on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import (
    EOS,
    OTHER,
    PROMPTS,
    A,
    B,
    Exact,
    assert_gradient,
    before,
    critic_before,
    exact,
    learner_of,
    rewards_of,
    sampled,
    stepped,
    watch,
)
from torch import Tensor

from upslope.models.attention.context import PackedContext
from upslope.recipes.ppo import PPO
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()


def ppo(folder: Path, **options: Any) -> Any:
    """One pass, no whitening, no value loss in the trunk: what is tested is switched on."""
    return learner_of(PPO, folder, **{"num_epochs": 1, "whiten_advantages": False, "vf_coef": 0.0, **options})


def surrogate(ratio: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Tensor:
    """The negative of eq. 7 of arXiv 1707.06347, and of eq. 5 of 1912.09729."""
    best = torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return -best if dual is None else -torch.where(a < 0, torch.maximum(best, dual * a), best)


class First:
    """What a step holds constant over its passes: the old log-probs and values, advantages and targets."""

    def __init__(self, learner: Any, taken: Any, *, kl: float = 0.0, after: bool = False, scores: Any = None) -> None:
        o = learner.options
        with before(learner, taken) as (x, _):
            self.old, (v, final_S) = x.logp_ST.detach(), x.values(learner.critic.network.head)
            self.v = v.detach()
            r = x.last(x.of(REWARDS) if scores is None else scores(x))
            if kl:
                r = r - kl * (self.old - exact(learner.reference.model).logp_ST.detach())
            after_S = torch.where(x.cut_S, final_S.detach(), 0.0) if after else 0.0
            if o.advantage == "n_step":
                self.a = n_step(x, r, self.v, o.gamma, o.n_step)
            else:
                self.a = x.gae(r, self.v, gamma=o.gamma, lam=o.lam, after_S=after_S)
            self.target = self.a + self.v
            self.a = x.whitened(self.a) if o.whiten_advantages else self.a


def n_step(x: Exact, r_ST: Tensor, v_ST: Tensor, gamma: float, n: int) -> Tensor:
    """r_t + ... + gamma^(n - 1) r_{t + n - 1} + gamma^n V_{t + n} - V_t, by its definition; V is 0 after the end."""
    out = torch.zeros_like(r_ST)
    for s, length in enumerate(x.lengths_S.tolist()):
        for t in range(length):
            last = min(t + n, length)
            rewards = sum(gamma ** (k - t) * r_ST[s, k] for k in range(t, last))
            out[s, t] = rewards + (gamma**n * v_ST[s, t + n] if t + n < length else 0.0) - v_ST[s, t]
    return out


def value_loss(x: Exact, learner: Any, first: First, clip: float | None = None) -> Tensor:
    """Half the squared error; clipped: the larger one of it and of that of a value near the old one."""
    v, _ = x.values(learner.critic.network.head)
    error = (v - first.target) ** 2
    if clip is not None:
        near = first.v + (v - first.v).clamp(-clip, clip)
        error = torch.maximum(error, (near - first.target) ** 2)
    return x.token_mean(0.5 * error)


PASSES: dict[str, dict[str, Any]] = {
    "clip": {"epsilon": 0.03},
    "clip higher": {"epsilon": 0.03, "epsilon_high": 0.3},
    "dual clip": {"epsilon": 0.03, "dual_clip": 1.1},
    "value clip": {"value_clip": 0.01, "vf_coef": 0.4},
    "whitened": {"whiten_advantages": True, "vf_coef": 0.4},
    "n steps": {"advantage": "n_step", "n_step": 2, "gamma": 0.9, "vf_coef": 0.4},
    "gamma and lambda": {"gamma": 0.9, "lam": 0.6, "vf_coef": 0.4},
}


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_the_gradient_of_the_clipped_objective(name: str, table_model: Path) -> None:
    """Three passes; ratios and value ranges are to what sampled, not to the pass before."""
    o = PASSES[name]
    learner = ppo(table_model, num_epochs=3, learning_rate=0.03, **o)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    assert len(taken) == 3
    first, shares = First(learner, taken[0]), []
    differ = {"plain": 0.0, "dual": 0.0, "value": 0.0}
    for one in taken:
        with before(learner, one) as (x, named):
            ratio = (x.logp_ST - first.old).exp()
            low = o.get("epsilon", 0.2)
            loss_ST = surrogate(ratio, first.a, low, o.get("epsilon_high", low), o.get("dual_clip"))
            value = value_loss(x, learner, first, o.get("value_clip"))
            assert_gradient(one, x.token_mean(loss_ST) + (o.get("vf_coef") or 0.0) * value, trunk(named, o))
            up, down = (first.a > 0) & (ratio > 1 + o.get("epsilon_high", low)), (first.a < 0) & (ratio < 1 - low)
            shares.append(float(x.token_mean((up | down).double())))
            differ["plain"] = max(differ["plain"], float((loss_ST + ratio * first.a).abs().max().detach()))
            differ["dual"] = max(
                differ["dual"], float((loss_ST - surrogate(ratio, first.a, low, low)).abs().max().detach())
            )
            differ["value"] = max(differ["value"], float((value - value_loss(x, learner, first)).abs().detach()))
    assert metrics["policy/clipfrac"] == pytest.approx(sum(shares) / 3)
    assert "epsilon" not in o or differ["plain"] > 1e-3
    assert not {"dual_clip", "epsilon_high"} & o.keys() or differ["dual"] > 1e-3
    assert "value_clip" not in o or differ["value"] > 1e-4


def trunk(named: dict[str, Any], o: dict[str, Any]) -> dict[str, Any]:
    """With the trunk kept from the value loss, the head's gradient is another objective's."""
    return named if o.get("vf_coef") else {name: p for name, p in named.items() if not name.startswith("critic")}


def test_without_vf_coef_the_head_alone_learns_the_value_at_full_weight(table_model: Path) -> None:
    learner = ppo(table_model, vf_coef=0.0)
    taken, _ = stepped(learner, sampled(REWARDS))
    first = First(learner, taken[0])
    with before(learner, taken[0]) as (x, named):
        head = {name: p for name, p in named.items() if name.startswith("critic")}
        assert_gradient(taken[0], value_loss(x, learner, first), head)


def test_a_critic_apart_learns_the_same_targets_and_leaves_the_policy_alone(table_model: Path) -> None:
    learner = ppo(table_model, critic="separate", num_epochs=2, vf_coef=0.4, value_clip=0.01)
    apart = watch(learner.critic.optimizer)
    taken, _ = stepped(learner, sampled(REWARDS))
    assert len(apart) == len(taken) == 2
    with critic_before(learner, apart[0]) as (c, named):
        v = c.values(learner.critic.network.head)[0].detach()
        a = c.gae(c.last(c.of(REWARDS)), v, gamma=1.0, lam=0.95)
    for one in apart:
        with critic_before(learner, one) as (c, named):
            now = c.values(learner.critic.network.head)[0]
            near = v + (now - v).clamp(-0.01, 0.01)
            error = torch.maximum((now - a - v) ** 2, (near - a - v) ** 2)
            assert_gradient(one, c.token_mean(0.5 * error), named)
    with before(learner, taken[0]) as (x, named):
        assert_gradient(taken[0], -x.token_mean(a * x.logp_ST), named)


@pytest.mark.parametrize("target", [None, 1e-3, 1e3], ids=str)
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_kl_to_the_reference(placement: str, target: float | None, table_model: Path) -> None:
    """reward: k1 under returns to go, in the targets, too; loss: the gradient of KL(pi || ref) at each state."""
    common: dict[str, Any] = {"num_epochs": 1, "vf_coef": 0.4, "learning_rate": 0.0}
    learner = ppo(table_model, kl_coef=0.3, kl_placement=placement, kl_target=target, kl_horizon=640, **common)
    taken, metrics = stepped(learner, sampled(REWARDS), steps=2)
    after = 0.3 * (1 + {None: 0.0, 1e-3: 0.2, 1e3: -0.2}[target] * 128 / 640)
    assert [m["objective/kl_coef"] for m in metrics] == pytest.approx([0.3, after])
    ref = exact(learner.reference.model)
    for coef, one in zip((0.3, after), taken, strict=True):
        first = First(learner, one, kl=coef if placement == "reward" else 0.0)
        with before(learner, one) as (x, named):
            loss = -x.token_mean(first.a * x.logp_ST) + 0.4 * value_loss(x, learner, first)
            if placement == "loss":
                loss = loss + coef * x.token_mean(x.divergences(ref))
            assert_gradient(one, loss, named)


def test_kl_in_the_loss_is_weighted_by_the_ratio_in_later_passes(table_model: Path) -> None:
    learner = ppo(table_model, kl_coef=0.3, kl_placement="loss", num_epochs=2, learning_rate=0.03)
    taken, _ = stepped(learner, sampled(REWARDS))
    first, ref_ST = First(learner, taken[0]), exact(learner.reference.model).logp_ST.detach()
    with before(learner, taken[1]) as (x, named):
        ratio = (x.logp_ST - first.old).exp()
        loss_ST = surrogate(ratio, first.a) + 0.3 * ratio * (x.logp_ST - ref_ST)
        assert_gradient(taken[1], x.token_mean(loss_ST), trunk(named, {}))


def test_the_penalty_form_holds_the_policy_near_what_sampled(table_model: Path) -> None:
    """+ rollout_kl_coef KL(pi_old || pi) (eq. 8), whose gradient appears with the second pass."""
    learner = ppo(table_model, rollout_kl_coef=5.0, num_epochs=2, learning_rate=0.03)
    taken, _ = stepped(learner, sampled(REWARDS))
    first = First(learner, taken[0])
    with before(learner, taken[0]) as (old, _):
        pass
    for one in taken:
        with before(learner, one) as (x, named):
            p, q = torch.log_softmax(old.logits_STV, -1).detach(), torch.log_softmax(x.logits_STV, -1)
            kl = x.token_mean((p.exp() * (p - q)).sum(-1))
            loss = x.token_mean(surrogate((x.logp_ST - first.old).exp(), first.a)) + 5.0 * kl
            assert_gradient(one, loss, trunk(named, {}))
    assert float(kl.detach()) > 1e-3


def test_target_kl_ends_the_passes_beyond_one_and_a_half_times_it(table_model: Path) -> None:
    def passes(target: float | None) -> tuple[int, float]:
        learner = ppo(table_model, target_kl=target, num_epochs=4, learning_rate=0.01)
        taken, (metrics,) = stepped(learner, sampled(REWARDS))
        assert metrics["optimizer_steps"] == len(taken)
        return len(taken), metrics["policy/approx_kl"] * len(taken)

    assert passes(None)[0] == 4
    passed, kl = passes(1e-9)
    assert passed == 2  # the first pass is at the policy that sampled
    assert kl > 1e-6
    assert passes(kl / 1.4)[0] > 2
    assert passes(kl / 1.6)[0] == 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entropy_and_temperature(temperature: float, table_model: Path) -> None:
    learner = ppo(table_model, entropy_coef=0.7, temperature=temperature)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=temperature) as (x, named):
        v = x.values(learner.critic.network.head)[0].detach()
        a = x.gae(x.last(x.of(REWARDS)), v, gamma=1.0, lam=0.95)
        entropy = x.token_mean(x.entropies())
        assert metrics["policy/entropy"] == pytest.approx(float(entropy.detach()))
        assert_gradient(taken[0], -x.token_mean(a * x.logp_ST) - 0.7 * entropy, trunk(named, {}))


@pytest.mark.parametrize("truncated", ["terminate", "bootstrap", "mask"])
def test_completions_that_were_cut(truncated: str, table_model: Path) -> None:
    """terminate: they end there; bootstrap: V of the state after them; mask: out of loss and denominator."""
    learner = ppo(table_model, truncated=truncated, gamma=0.9, lam=0.6, vf_coef=0.4)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    first = First(learner, taken[0], after=truncated == "bootstrap")
    with before(learner, taken[0]) as (x, named):
        counted = ~x.cut_S if truncated == "mask" else torch.ones(len(x.cut_S))
        v = x.values(learner.critic.network.head)[0]
        loss_ST = -first.a * x.logp_ST + 0.4 * 0.5 * (v - first.target) ** 2
        assert_gradient(taken[0], x.token_mean(loss_ST, counted), named)
        left_out = 128 * float(x.expected(1.0 - counted.double()))
    assert metrics["rollout/left_out"] == pytest.approx(left_out)


def test_penalties_are_subtracted_once_and_are_in_the_targets(table_model: Path) -> None:
    learner = ppo(table_model, missing_eos_penalty=0.7, overlong_buffer=2, vf_coef=0.4)
    taken, _ = stepped(learner, sampled(REWARDS))

    def scores(x: Exact) -> Tensor:
        return x.of(REWARDS) - torch.tensor([0.0, 0.5, 1.0])[x.lengths_S - 1] - 0.7 * x.cut_S

    first = First(learner, taken[0], scores=scores)
    with before(learner, taken[0]) as (x, named):
        loss = -x.token_mean(first.a * x.logp_ST) + 0.4 * value_loss(x, learner, first)
        assert_gradient(taken[0], loss, named)


def test_minibatches_are_whole_prompts_each_with_its_own_denominator(table_model: Path) -> None:
    learner = ppo(table_model, num_minibatches=2, num_epochs=2, vf_coef=0.4, learning_rate=0.0)
    taken, _ = stepped(learner, sampled(REWARDS))
    first = First(learner, taken[0])
    seen = []
    for one in taken:
        with before(learner, one) as (x, named):
            loss_ST = surrogate((x.logp_ST - first.old).exp(), first.a)
            loss_ST = loss_ST + 0.4 * 0.5 * (x.values(learner.critic.network.head)[0] - first.target) ** 2
            for g in (0, 1):
                counted = torch.tensor([key[0] == g for key in x.keys])
                (head,) = torch.autograd.grad(
                    x.token_mean(loss_ST, counted), named["lm_head.weight"], retain_graph=True
                )
                if torch.allclose(head, one.gradients["lm_head.weight"]):
                    seen.append(g)
                    assert_gradient(one, x.token_mean(loss_ST, counted), named)
    assert sorted(seen[:2]) == sorted(seen[2:]) == [0, 1]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_value_pretraining_moves_the_critic_only(critic: str, table_model: Path) -> None:
    learner = ppo(table_model, critic=critic, value_pretraining_steps=1, vf_coef=0.4, lam=1.0)
    apart = watch(learner.critic.optimizer) if critic == "separate" else []
    taken, _ = stepped(learner, sampled(REWARDS), steps=2)
    assert len(taken) == (2 if critic == "shared" else 1)
    assert len(apart) == (0 if critic == "shared" else 2)
    if critic == "separate":
        return
    with before(learner, taken[0]) as (x, named):
        error = (x.values(learner.critic.network.head)[0] - x.to_go(x.last(x.of(REWARDS)))) ** 2
        assert_gradient(taken[0], x.token_mean(0.5 * error), {n: p for n, p in named.items() if n.startswith("critic")})
    for name, w in taken[0].weights.items():
        assert torch.equal(w, taken[1].weights[name]) != name.startswith("critic"), name
    with before(learner, taken[1]) as (x, named):
        v = x.values(learner.critic.network.head)[0]
        returns = x.to_go(x.last(x.of(REWARDS)))
        loss_ST = -(returns - v).detach() * x.logp_ST + 0.4 * 0.5 * (v - returns) ** 2
        assert_gradient(taken[1], x.token_mean(loss_ST), named)


@pytest.mark.parametrize(("rho", "c", "truncated"), [(1.0, 1.0, "terminate"), (1.5, 1.2, "bootstrap")])
def test_vtrace_over_rollouts_of_other_weights(rho: float, c: float, truncated: str, table_model: Path) -> None:
    """vs_t and the advantage of arXiv 1802.01561, section 4.1, by their sums; no further importance weight."""
    common: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "vf_coef": 0.4, "truncated": truncated}
    learner = ppo(table_model, advantage="vtrace", rollout_lag=1, rho_clip=rho, c_clip=c, **common)
    taken, _ = stepped(learner, sampled(REWARDS, table=OTHER))
    with ExitStack() as stack:
        x, named = stack.enter_context(before(learner, taken[0], table=OTHER))
        mu = x.logps(OTHER)
        ratio = (x.logp_ST.detach() - mu).exp()
        assert ratio[x.mask_ST].max() > 1.5
        (v, final_S), r = x.values(learner.critic.network.head), x.last(x.of(REWARDS))
        after = torch.where(x.cut_S & (truncated == "bootstrap"), final_S, 0.0).tolist()
        vs, advantages = torch.zeros(r.shape), torch.zeros(r.shape)
        for s, n in enumerate(x.lengths_S.tolist()):
            values = [*v[s, :n].tolist(), after[s]]
            w = [min(rho, float(ratio[s, k])) for k in range(n)]
            delta = [w[k] * (float(r[s, k]) + 0.9 * values[k + 1] - values[k]) for k in range(n)]
            for t in range(n):
                total, trace = values[t], 1.0
                for k in range(t, n):
                    total += 0.9 ** (k - t) * trace * delta[k]
                    trace *= 0.8 * min(c, float(ratio[s, k]))
                vs[s, t] = total
            for t in range(n):
                following = float(vs[s, t + 1]) if t + 1 < n else after[s]
                advantages[s, t] = w[t] * (float(r[s, t]) + 0.9 * following - values[t])
        loss_ST = -advantages * x.logp_ST + 0.4 * 0.5 * (v - vs) ** 2
        assert_gradient(taken[0], x.token_mean(loss_ST), named)


def test_the_critic_has_its_own_rate(table_model: Path) -> None:
    """AdamW's first step is as long as its rate: ten times the policy's, or as given."""
    for critic in ("shared", "separate"):
        for given, expected in ((None, 0.01), (0.004, 0.004)):
            learner = ppo(table_model, learning_rate=0.001, critic_learning_rate=given, critic=critic)
            head, policy = learner.critic.network.head.score.weight.data, learner.policy.model.lm_head.weight.data
            before_head, before_policy = head.clone(), policy.clone()
            stepped(learner, sampled(REWARDS))
            assert float((head - before_head).abs().max()) == pytest.approx(expected, rel=1e-4)
            assert float((policy - before_policy).abs().max()) == pytest.approx(0.001, rel=1e-4)


def test_the_reference_has_the_temperature(table_model: Path) -> None:
    learner = ppo(table_model, kl_coef=0.3, temperature=2.0)
    taken, (metrics,) = stepped(learner, sampled(REWARDS))
    with before(learner, taken[0], temperature=2.0) as (x, _):
        kl_ST = x.logp_ST - exact(learner.reference.model, temperature=2.0).logp_ST
        assert metrics["objective/kl"] == pytest.approx(float(x.expected((kl_ST * x.mask_ST).sum(1)).detach()))


def test_observed_tokens_are_passed_over(table_model: Path) -> None:
    """What the environment wrote has no loss, no reward and no step in the trace: a compact row says the same."""
    told = PROMPTS[1][-1]
    rows = [
        ([A, told, B, EOS], [True, False, True, True], 1.0),
        ([B, told, told, A, A, B], [True, False, False, True, True, True], -2.0),
        ([EOS], [True], 0.5),
    ]
    prompt, rollouts = list(PROMPTS[0]), []
    learner = ppo(table_model, gamma=0.9, lam=0.6, vf_coef=0.4, max_completion_length=8)
    losses, named = [], dict(learner.policy.model.named_parameters())
    for tokens, mask, value in rows:
        ids = torch.tensor([*prompt, *tokens])
        hidden = learner.policy.model(ids, PackedContext([len(ids)]))
        before_each = hidden[len(prompt) - 1 : -1]
        own = torch.tensor(mask)
        logp = torch.log_softmax(before_each @ learner.policy.model.head_weight.T, -1)
        logp = logp[torch.arange(len(tokens)), torch.tensor(tokens)]
        v = (before_each @ learner.critic.network.head.score.weight[0] + learner.critic.network.head.score.bias)[own]
        r, next_v = torch.zeros(len(v)), torch.cat([v[1:], torch.zeros(1)]).detach()
        r[-1] = value
        delta = r + 0.9 * next_v - v.detach()
        a = torch.stack([sum(0.54 ** (k - t) * delta[k] for k in range(t, len(v))) for t in range(len(v))])  # type: ignore[misc]
        losses.append(-a * logp[own] + 0.4 * 0.5 * (v - (a + v.detach())) ** 2)
        numbers = logp.tolist()
        done = "stop" if tokens[-1] == EOS else "length"
        rollouts.append(Rollout(prompt, tokens, mask, numbers, numbers, done, "", 0, reward=Reward(value)))  # type: ignore[arg-type]
    loss = torch.cat(losses).mean()
    wanted = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    taken, _ = stepped(learner, [RolloutGroup(Prompt(key=0, text=""), rollouts)])
    for (name, p), g in zip(named.items(), wanted, strict=True):
        torch.testing.assert_close(taken[0].gradients[name], torch.zeros_like(p) if g is None else g)
