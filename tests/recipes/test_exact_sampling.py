"""Around the losses of the recipes that sample: sampling, judging, evaluation, rates, the clip of the norm."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from exact_kit import LENGTH, learner_of, rewards_of, sampled, stepped

from upslope.loop import sampler as sampler_module
from upslope.options import PPOOptions
from upslope.recipes.grpo import GRPO
from upslope.recipes.ppo import PPO
from upslope.rollout import collect
from upslope.workers.rewards import make_scorer

pytestmark = pytest.mark.usefixtures("in_float64")
REWARDS = rewards_of()
GROUP = 64


def test_a_step_samples_anew(table_model: Path) -> None:
    """What is sampled depends on (seed, step, round, prompt, sample), and on nothing else."""

    def tokens(step: int, round_: int, **options: Any) -> dict[Any, list[list[int]]]:
        learner = learner_of(GRPO, table_model, num_train_prompts=2, **options)
        groups, _ = learner.sampler.sample(step, round_=round_)
        return {g.prompt.key: [r.tokens for r in g.rollouts] for g in groups}

    first = tokens(0, 0)
    assert tokens(0, 0) == first
    assert [len(group) for group in first.values()] == [GROUP, GROUP]
    assert {len(one) for group in first.values() for one in group} == {1, 2, LENGTH}
    for other in (tokens(1, 0), tokens(0, 1)):
        assert all(other[key] != first[key] for key in first)
    assert not {str(x) for x in tokens(0, 0, seed=1).values()} & {str(x) for x in first.values()}
    assert len({str(x) for x in first.values()}) == 2
    assert all(len({str(one) for one in group}) > 5 for group in first.values())


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_filters_act_on_the_rollouts(options: dict[str, Any], table_model: Path) -> None:
    def kinds(**more: Any) -> int:
        learner = learner_of(GRPO, table_model, **more)
        groups, _ = learner.sampler.sample(0)
        return max(len({str(r.tokens) for r in g.rollouts}) for g in groups)

    assert kinds() > 8
    assert kinds(**options, rollout_correction="token") <= 2  # two first tokens are equally likely


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_real_step_is_on_policy_at_any_temperature(temperature: float, table_model: Path) -> None:
    learner = learner_of(PPO, table_model, temperature=temperature, num_generations=8)
    metrics = learner.step(0).metrics
    assert metrics["rollout/max_logprob_diff"] < 1e-12


def test_rewards_are_computed_as_the_options_say(table_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def spy(task: Any, rewards: Any, **more: Any) -> Any:
        asked.append((rewards, more["processes"], more["timeout_s"]))
        return make_scorer(task, rewards, **more)

    monkeypatch.setattr(sampler_module, "make_scorer", spy)
    learner = learner_of(PPO, table_model, reward=("length:target=2",), reward_workers=1, reward_timeout=7.5)
    try:
        assert asked == [(("length:target=2",), 1, 7.5)]
        groups, _ = learner.sampler.sample(0)
        assert all(set(r.reward.parts) == {"length"} for g in groups for r in g.rollouts)
    finally:
        learner.close()


def test_evaluation_is_greedy_and_leaves_the_training_alone(table_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def spy(engine: Any, tokenizer: Any, judge: Any, prompts: Any, params: Any) -> Any:
        asked.append((prompts, params))
        return collect(engine, tokenizer, judge, prompts, params)

    monkeypatch.setattr(sampler_module, "collect", spy)
    tokens = []
    for evaluates in (True, False):
        learner = learner_of(PPO, table_model, eval_samples=3, temperature=2.0, num_generations=8, seed=5)
        if evaluates:
            assert learner.evaluate(0) is not None
            ((prompts, params),) = asked
            assert params.temperature == 0.0
            assert prompts == learner.sampler.task.prompts("eval", 3, seed=0)
            assert not {p.key for p in prompts} & {p.key for p in learner.sampler.prompts}
            assert params.seed == learner.options.seed == 5
            assert learner.sampler.prompts == learner.sampler.task.prompts("train", 4, seed=5)
        groups, _ = learner.sampler.sample(0)
        tokens.append([r.tokens for g in groups for r in g.rollouts])
    assert tokens[0] == tokens[1]


def test_rates_follow_the_schedule_by_steps_and_not_by_passes(table_model: Path) -> None:
    learner = learner_of(
        PPO, table_model, learning_rate=0.04, lr_scheduler_type="linear", warmup_steps=1, max_steps=5, num_epochs=2
    )
    taken, _ = stepped(learner, sampled(REWARDS), steps=4)
    assert [one.learning_rate for one in taken] == pytest.approx([0.02, 0.02, 0.04, 0.04, 0.03, 0.03, 0.02, 0.02])


@pytest.mark.parametrize("make", [PPO, GRPO])
def test_the_gradient_is_scaled_down_to_its_norm(make: Any, table_model: Path) -> None:
    """AdamW's first moment is (1 - beta_1) times the gradient it was given."""
    for limit in (0.01, 0.0):
        passes = {"num_epochs": 1} if make is PPO else {"num_iterations": 1}
        learner = learner_of(make, table_model, max_grad_norm=limit, **passes)
        taken, (metrics,) = stepped(learner, sampled(REWARDS))
        moments = {k.removesuffix("|exp_avg"): x for k, x in learner.optimizer.state().items() if "exp_avg" in k}
        norm = float(torch.cat([10 * moments[name].flatten() for name in taken[-1].gradients]).norm())
        assert len(taken) == 1
        assert norm == pytest.approx(limit or metrics["grad_norm"])
        assert metrics["grad_norm"] > 0.05


def test_held_out_replies_that_were_not_judged_are_in_no_mean(table_model: Path, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "def some(prompts, completions):\n    return [2.0 if p.key % 2 else None for p in prompts]\n"
    )
    learner = learner_of(PPO, table_model, eval_samples=8, reward=(f"{tmp_path}/some.py:some",))
    try:
        assert 0 < sum(p.key % 2 for p in learner.sampler.eval_prompts) < 8
        found = learner.evaluate(0)
        assert found.value == found.metrics["reward"]["value"] == 2.0
        assert found.metrics["reward"]["n"] + found.metrics["reward"]["errors"] == 8
    finally:
        learner.close()


def test_activations_have_the_room_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """In GB of 10^9 bytes; left out: a third of what is free."""
    asked: list[int] = []

    def of(model: Any, *, tokens: int, limit_bytes: int) -> None:
        asked.append(limit_bytes)

    monkeypatch.setattr(sampler_module.Activations, "of", of)
    policy: Any = SimpleNamespace(model=SimpleNamespace(exact=True), lora=None)
    for given in (2.5, 0.0, None):
        sampler_module.room_for_activations(PPOOptions(activations_gb=given), policy, 10)
    assert asked[:2] == [2_500_000_000, 0]
    assert 0.2 < asked[2] / psutil.virtual_memory().available < 0.5
