"""REINFORCE and its baselines, and the family of GRPO: by hand, in float64 against the papers, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import estimated, network_of
from test_recipes import TASK, lines, rl
from test_resume import assert_same, comparable

from upslope.build import Policy, load_policy
from upslope.config import load as load_config
from upslope.errors import ConfigError, DataError
from upslope.loop import sampler as sampler_module
from upslope.options import GRPOOptions, PPOOptions, ReinforceOptions
from upslope.preview.dry_run import run as dry_run
from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import PPO
from upslope.recipes.reinforce import MovingBaseline, Reinforce, reinforce
from upslope.training.experience import Experience, token_rewards
from upslope.training.step import Forward, accumulate
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASELINES: dict[str, dict[str, Any]] = {
    "none": {"baseline": "none", "normalizer": "constant"},
    "moving": {"baseline": "moving", "baseline_decay": 0.5},
    "learned": {"baseline": "learned", "lam": 0.9},
    "learned apart": {"baseline": "learned", "critic": "separate", "truncated": "bootstrap"},
    "greedy": {"baseline": "greedy", "missing_eos_penalty": 0.1},
    "reinforce++": {"baseline": "reinforce++", "kl_coef": 0.05, "kl_target": 1.0},
    "entropy and whitening": {"baseline": "none", "entropy_coef": 0.01, "whiten_advantages": True, "lora_rank": 4},
}


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("task") / "letter.py"
    path.write_text(TASK)
    return f"{path}:Letter"


def crafted(seed: int = 0, *, steps: bool = False) -> list[RolloutGroup]:
    """Three prompts with four completions each: random tokens, lengths 1 to 5, random rewards, one equal group."""
    draw = torch.Generator().manual_seed(seed)

    def ints(n: int) -> list[int]:
        return torch.randint(2, 258, (n,), generator=draw).tolist()

    groups = []
    for g in range(3):
        prompt, rollouts = ints(3 + g), []
        for i in range(4):
            tokens = ints(1 + int(torch.randint(0, 5, (1,), generator=draw)))
            value = 0.5 if g == 2 else float(torch.randn((), generator=draw))
            own = [(t, float(torch.randn((), generator=draw))) for t in range(len(tokens))] if steps else []
            nothing = [0.0] * len(tokens)
            done = "length" if i == 3 else "stop"
            judged = Reward(value=value, steps=own)
            rollouts.append(
                Rollout(prompt, tokens, [True] * len(tokens), nothing, nothing, done, "", i, reward=judged)  # type: ignore[arg-type]
            )
        groups.append(RolloutGroup(Prompt(key=g, text="x"), rollouts))
    return groups


def in_float64(policy: Policy) -> Policy:
    policy.model.double()
    return policy


def gradients(learner: Any, experience: Experience, normalizer: str, constant: int | None = None) -> dict[str, Any]:
    """The gradient of the learner's own loss over the whole experience, two micro-batches."""
    experience.set_weights(range(experience.size), normalizer, constant=constant)  # type: ignore[arg-type]
    batches, _ = experience.batches(range(experience.size), 24)
    assert len(batches) > 1
    learner.optimizer.zero_grad()
    critic = network_of(learner)
    accumulate(learner.policy.model, batches, learner.loss, Forward(head=critic.head if critic else None))
    return {name: g.clone() for name, g in learner.optimizer.gradients().items()}


def test_a2c_is_reinforce_with_a_learned_baseline(
    tiny: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same advantages, same gradient: PPO at one pass and one minibatch has REINFORCE's (arXiv 2205.09123)."""
    monkeypatch.setattr(sampler_module, "samples_exactly", lambda *_: False)  # crafted rollouts were not sampled
    shipped = load_config(PPOOptions, CONFIGS / "ppo_a2c.toml")
    assert (shipped.num_epochs, shipped.num_minibatches, shipped.rollout_lag) == (1, 1, 0)
    common = rl(tiny, task, tmp_path / "run", lam=0.9, vf_coef=shipped.vf_coef)
    same = {"gamma": shipped.gamma, "whiten_advantages": shipped.whiten_advantages}
    a2c = PPO(PPOOptions(**common, **same, num_epochs=1), in_float64(load_policy(PPOOptions(**common))))
    actor = ReinforceOptions(**common, **same, baseline="learned")
    plain = Reinforce(actor, in_float64(load_policy(actor)))
    torch.manual_seed(0)
    weight = torch.randn(1, 32)
    found = []
    for learner in (a2c, plain):
        learner.critic.network.head.score.weight.data = weight.double()
        experience, _ = estimated(learner, crafted())
        found.append((experience.advantages, gradients(learner, experience, "token")))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].abs().max() > 0.1
    for name, g in found[0][1].items():
        torch.testing.assert_close(g, found[1][1][name], rtol=1e-9, atol=1e-12)
    assert any("critic" in name for name in found[0][1])


def plain_logp(policy: Policy, groups: list[RolloutGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] log-probs and mask, one plain forward pass per sequence, log-softmax over everything."""
    from upslope.models.attention.context import PackedContext

    rows = []
    for group in groups:
        for r in group.rollouts:
            tokens = torch.tensor([*r.prompt_tokens, *r.tokens])
            logits = policy.model(tokens, PackedContext([len(tokens)])) @ policy.model.head_weight.T
            logp = torch.log_softmax(logits, -1)[torch.arange(len(tokens) - 1), tokens[1:]]
            rows.append(logp[len(r.prompt_tokens) - 1 :])
    logp_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True)
    return logp_BT, mask_BT.double()


def normal(r: torch.Tensor) -> torch.Tensor:
    return (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4) * (r.amax(1) > r.amin(1))[:, None]


def centred(r: torch.Tensor) -> torch.Tensor:
    return r - r.mean(1, keepdim=True)


def clipped(rho: torch.Tensor, a: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return -torch.minimum(rho * a, rho.clamp(1 - low, 1 + high) * a)


def by_tokens(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (x * m).sum() / m.sum()


def by_sequences(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return ((x * m).sum(1) / m.sum(1)).mean()


def dapo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    """Eq. 8, after overlong filtering (the cut completions carry no loss) and the soft penalty of eq. 13."""
    n = m.sum(1)
    r = r + ((length - 2 - n) / 2).clamp(-1, 0)
    kept = (torch.arange(len(n)) % 4 != 3).double()
    r3 = r[kept.bool()].view(3, 3)
    a = torch.zeros_like(r)
    a[kept.bool()] = normal(r3).flatten()
    return by_tokens(clipped((logp - old).exp(), a[:, None], 0.2, 0.28), m * kept[:, None])


def gspo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    s = (((logp - old) * m).sum(1) / m.sum(1)).exp()
    return clipped(s, normal(r.view(3, 4)).flatten(), 3e-4, 4e-4).mean()


def cispo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    weight = (logp - old).exp().clamp(max=5.0).detach()
    return by_tokens(-weight * normal(r.view(3, 4)).flatten()[:, None] * logp, m)


def sapo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    a = normal(r.view(3, 4)).flatten()[:, None]
    tau = torch.where(a > 0, 1.0, 1.05).double()
    return by_sequences(-4 / tau / (1 + torch.exp(-tau * ((logp - old).exp() - 1))) * a, m)


def dr_grpo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    a = centred(r.view(3, 4)).flatten()[:, None]
    return (clipped((logp - old).exp(), a, 0.2, 0.2) * m).sum() / (len(r) * length)


def rloo(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    """The whole sequence's log-prob times (R - mean of the others): taken at pi = pi_old, where no ratio matters."""
    others = (r.view(3, 4).sum(1, keepdim=True) - r.view(3, 4)) / 3
    a = (r.view(3, 4) - others).flatten()
    return -(a * (logp * m).sum(1)).mean() / length


def reinforce_plus_plus(logp: Any, old: Any, m: Any, r: Any, length: int) -> Any:
    """Centred on the group, then whitened over the batch's completions; the KL is zero with a zero gradient here."""
    a = centred(r.view(3, 4)).flatten()
    a = (a - a.mean()) / (a.var() + 1e-8).sqrt()
    return by_tokens(clipped((logp - old).exp(), a[:, None], 0.2, 0.2), m)


FAMILY = {f.__name__: f for f in (dapo, gspo, cispo, sapo, dr_grpo, rloo, reinforce_plus_plus)}


@pytest.mark.parametrize("name", FAMILY)
def test_shipped_family_has_the_gradient_of_its_paper(
    name: str, tiny: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TOML's loss on a crafted batch against autograd through the paper's formula, padded, in float64."""
    monkeypatch.setattr(sampler_module, "samples_exactly", lambda *_: False)
    shipped = load_config(GRPOOptions, CONFIGS / f"grpo_{name}.toml")
    options = replace(
        shipped,
        **rl(tiny, task, tmp_path / "run", max_completion_length=6, num_generations=4),
        rollout_correction="none",
        dynamic_sampling=False,
        beta=0.0,
    )
    learner = GRPO(options, in_float64(load_policy(options)))
    groups = crafted()
    with torch.no_grad():
        old_BT, _ = plain_logp(learner.policy, groups)
    experience, _ = estimated(learner, groups)
    if name != "rloo":
        torch.manual_seed(1)
        with torch.no_grad():
            for p in learner.policy.model.parameters():
                p.add_(torch.randn_like(p) * 0.02)
    from upslope.recipes.grpo import _normalizer

    normalizer = _normalizer(options)
    constant = options.max_completion_length if normalizer == "constant" else None
    found = gradients(learner, experience, normalizer, constant)

    learner.policy.model.zero_grad()
    logp_BT, mask_BT = plain_logp(learner.policy, groups)
    rewards_B = torch.tensor([r.reward.value for g in groups for r in g.rollouts], dtype=torch.float64)
    if name != "rloo":
        assert ((logp_BT - old_BT) * mask_BT).abs().max() > 0.3, "some ratios must be clipped"
    FAMILY[name](logp_BT, old_BT, mask_BT, rewards_B, options.max_completion_length).backward()
    largest = max(float(p.grad.abs().max()) for p in learner.policy.model.parameters() if p.grad is not None)
    for key, p in learner.policy.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[key], p.grad, rtol=1e-5, atol=1e-6 * largest, msg=lambda m, k=key: f"{k}: {m}")


def test_shipped_family_is_what_its_paper_says() -> None:
    """What the crafted batch cannot show: dynamic sampling, the KL term, one step for RLOO."""
    loaded = {n: load_config(GRPOOptions, CONFIGS / f"grpo_{n}.toml") for n in FAMILY}
    assert loaded["dapo"].dynamic_sampling
    assert loaded["dapo"].beta == 0
    assert loaded["reinforce_plus_plus"].beta > 0
    assert (loaded["rloo"].num_iterations, loaded["rloo"].num_minibatches) == (1, 1)


@pytest.mark.parametrize("variant", BASELINES)
def test_reinforce_runs_on_policy(variant: str, tiny: Path, task: str, tmp_path: Path) -> None:
    summary = reinforce(ReinforceOptions(**rl(tiny, task, tmp_path / "run", **BASELINES[variant])))
    assert summary["steps"] == 3
    for line in lines(tmp_path / "run"):
        assert line["rollout/max_logprob_diff"] == 0.0
        assert line["rollout/lag"] == 0
        assert line["optimizer_steps"] == 1


def advantages_of(learner: Reinforce, groups: list[RolloutGroup], greedy: list[RolloutGroup]) -> torch.Tensor:
    experience, _ = estimated(learner, groups, greedy)
    return experience.padded(experience.advantages)


def test_advantages_by_hand(tiny: Path, task: str, tmp_path: Path) -> None:
    """Two completions of three and two tokens, rewards 1 and 3, gamma 1/2."""

    def make(values: tuple[float, ...], lengths: tuple[int, ...]) -> list[RolloutGroup]:
        rollouts = [
            Rollout([5], [9] * n, [True] * n, [0.0] * n, [0.0] * n, "stop", "", i, reward=Reward(v))
            for i, (v, n) in enumerate(zip(values, lengths, strict=True))
        ]
        return [RolloutGroup(Prompt(key=0, text="x"), rollouts)]

    common = rl(tiny, task, tmp_path / "run", gamma=0.5, rollout_correction="none")
    returns = torch.tensor([[0.25, 0.5, 1.0], [1.5, 3.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])

    def learner(**more: Any) -> Reinforce:
        options = ReinforceOptions(**common, **more)
        return Reinforce(options, load_policy(options))

    groups, greedy = make((1.0, 3.0), (3, 2)), make((2.0,), (1,))
    torch.testing.assert_close(advantages_of(learner(baseline="none"), groups, []), returns)
    torch.testing.assert_close(advantages_of(learner(baseline="greedy"), groups, greedy), (returns - 2) * mask)
    torch.testing.assert_close(advantages_of(learner(baseline="learned"), groups, []), returns)  # a fresh critic says 0
    whitened = advantages_of(learner(baseline="reinforce++"), groups, [])
    flat = returns[mask.bool()]
    torch.testing.assert_close(whitened[mask.bool()], (flat - flat.mean()) / flat.std(), rtol=1e-5, atol=1e-6)
    moving = learner(baseline="moving", baseline_decay=0.75)
    torch.testing.assert_close(advantages_of(moving, groups, []), returns)
    second = (returns * torch.tensor([[8.0], [8 / 3]]) - 2) * mask
    torch.testing.assert_close(advantages_of(moving, make((8.0, 8.0), (3, 2)), []), second)
    assert moving.moving.value == pytest.approx((0.75 * 0.25 * 2 + 0.25 * 8) / (0.75 * 0.25 + 0.25))


def test_moving_baseline_starts_at_zero_and_has_no_pull() -> None:
    baseline = MovingBaseline(0.9)
    assert baseline.value == 0
    baseline.update(5.0)
    assert baseline.value == pytest.approx(5.0)


def test_step_rewards_land_on_their_tokens() -> None:
    """By hand: an index counts the rollout's tokens, one on an observed token moves to the action before it."""
    mask = [True, False, True, True]
    nothing = [0.0] * 4
    steps = [(0, 1.0), (1, 0.25), (2, -2.0)]
    judged = Reward(value=3.0, steps=steps)
    rollout = Rollout([5], [6, 7, 8, 9], mask, nothing, nothing, "stop", "", 0, reward=judged)
    plain = Rollout([5], [6], [True], [0.0], [0.0], "stop", "", 1, reward=Reward(value=2.0))
    experience = Experience.of([RolloutGroup(Prompt(key=0, text="x"), [rollout, plain])])
    rewards_BT = token_rewards(experience, torch.tensor([3.0, 2.0]))
    assert rewards_BT.tolist() == [[1.25, -2.0, 3.75], [2.0, 0.0, 0.0]]
    rollout.reward.steps = [(4, 1.0)]
    with pytest.raises(DataError, match="token 4 of a completion of 4"):
        token_rewards(experience, torch.tensor([3.0, 2.0]))


def test_step_rewards_reach_ppo_and_reinforce_but_grpo_takes_the_total(tiny: Path, task: str, tmp_path: Path) -> None:
    common = rl(tiny, task, tmp_path / "run", rollout_correction="none")
    ppo_options = PPOOptions(**common, lam=1.0, whiten_advantages=False)
    actor = ReinforceOptions(**common, baseline="none")
    group_options = GRPOOptions(**common, advantage="dr_grpo")
    learners = [
        PPO(ppo_options, load_policy(ppo_options)),
        Reinforce(actor, load_policy(actor)),
        GRPO(group_options, load_policy(group_options)),
    ]
    first, second, third = (estimated(learner, crafted(steps=True))[0] for learner in learners)
    for row, rollout in enumerate(first.rollouts):
        rest = rollout.reward.value - sum(v for _, v in rollout.reward.steps)  # type: ignore[operator]
        for t in range(len(rollout.tokens)):
            expected = sum(v for i, v in rollout.reward.steps if i >= t) + rest
            for experience in (first, second):
                found = experience.padded(experience.advantages)[row, t]
                assert float(found) == pytest.approx(expected, abs=1e-5)
    whole = [r.reward.value for r in third.rollouts[:4]]
    expected = whole[0] - sum(whole) / 4  # type: ignore[arg-type]
    assert float(third.advantages[0]) == pytest.approx(expected, abs=1e-5)


LEARNING: dict[str, dict[str, Any]] = {
    "moving": {"max_steps": 60},
    "greedy": {"max_steps": 40, "learning_rate": 1e-2},
    "learned": {"max_steps": 55, "whiten_advantages": True},
}


@pytest.mark.parametrize("baseline", LEARNING)
def test_reinforce_learns(baseline: str, tiny: Path, task: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_prompts": 8, "num_generations": 8, "lr_scheduler_type": "constant"}
    changes |= {"eval_samples": 0, **LEARNING[baseline]}
    reinforce(ReinforceOptions(**rl(tiny, task, tmp_path / "run", baseline=baseline, **changes)))
    rewards = [line["reward"] for line in lines(tmp_path / "run")]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.5, rewards


@pytest.mark.parametrize("variant", ["moving", "greedy", "learned apart"])
def test_resume_after_an_interruption(variant: str, tiny: Path, task: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        **BASELINES[variant],
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_every": 1,
        "eval_every": 2,
    }
    options = ReinforceOptions(**rl(tiny, task, tmp_path / "whole", **changes))
    reinforce(options)
    half = replace(options, output_dir=str(tmp_path / "parts"), max_steps=2)
    reinforce(half)
    reinforce(replace(half, max_steps=4, resume=True))
    assert_same(comparable(tmp_path / "parts"), comparable(tmp_path / "whole"))


def test_a_failed_greedy_reply_leaves_its_prompt_out(tiny: Path, task: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "def some(prompts, completions):\n"
        "    return [None if int(p.messages[-1].content[4:]) % 2 and len(completions) == 1 else 1.0 for p in prompts]\n"
    )
    options = rl(tiny, task, tmp_path / "run", reward=(f"{tmp_path}/broken.py:some",), eval_samples=0, max_steps=1)
    reinforce(ReinforceOptions(**options, baseline="greedy"))
    (line,) = lines(tmp_path / "run")
    assert line["rollout/left_out"] > 0
    assert line["rollout/left_out"] % 4 == 0


def test_dry_run_and_plan(tiny: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ReinforceOptions(
        model=str(tiny), task=task, baseline="learned", num_train_prompts=40, eval_samples=9, json=True
    )
    assert dry_run(options) == 0
    said = json.loads(capsys.readouterr().out)
    assert any("critic is a head" in line for line in said["plan"]["words"])
    assert said["plan"]["optimizer_steps_per_step"] == 1


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (ReinforceOptions, {"baseline": "none", "lam": 0.9}, "baseline = learned"),
        (ReinforceOptions, {"baseline": "greedy", "critic": "separate"}, "baseline = learned"),
        (ReinforceOptions, {"baseline": "learned", "baseline_decay": 0.5}, "baseline = moving"),
        (ReinforceOptions, {"baseline": "moving", "truncated": "bootstrap"}, "critic"),
        (ReinforceOptions, {"baseline": "reinforce++", "whiten_advantages": False}, "whitening"),
        (ReinforceOptions, {"kl_target": 1.0}, "kl_coef"),
        (ReinforceOptions, {"kl_target": 1.0, "kl_coef": 0.1, "kl_horizon": 1}, "kl_horizon = 1 is too short"),
        (ReinforceOptions, {"rollout_lag": -1}, "rollout_lag"),
        (ReinforceOptions, {"top_k": 5}, "rollout_correction"),
        (PPOOptions, {"rho_clip": 2.0}, "vtrace"),
        (PPOOptions, {"advantage": "vtrace", "rollout_correction": "token"}, "twice"),
        (PPOOptions, {"advantage": "vtrace", "top_k": 5}, "top_k"),
        (GRPOOptions, {"tau_positive": 2.0}, "sapo"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_options_are_one_clear_line(kind: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        kind(**change).validate()
    assert "\n" not in str(caught.value)
