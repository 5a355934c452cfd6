"""Expert iteration through whole steps: which samples are kept, and the likelihood's gradient on just those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient
from plain_kit import (
    asked,
    assert_first_update,
    assert_other,
    batches_of,
    double_policy,
    ids_of,
    logits,
    logps,
    return_to,
    sampled_by,
    taken_by,
    trained,
    write,
)
from torch import Tensor

from upslope.models.protocol import CausalModel
from upslope.options import ExpertOptions
from upslope.recipes.expert import Expert
from upslope.runs.folder import Run
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")

TASK = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
SAMPLES = [
    (0, "aa", 1.0, True),
    (0, "aa", 1.0, True),
    (0, "b", 0.8, True),
    (0, "ccc", 0.6, True),
    (0, "dddd...", 0.9, True),  # cut off by the budget
    (0, "e", 0.1, False),
    (1, "f", 0.7, True),
    (1, "gg", 0.3, False),
]
"""Prompt, text, reward, verdict."""


def groups_of(samples: Sequence[tuple[int, str, float | None, bool | None]]) -> list[RolloutGroup]:
    groups = {key: RolloutGroup(Prompt(key, text=f"Say {key}"), []) for key, *_ in samples}
    for key, text, value, correct in samples:
        cut, head = text.endswith("..."), ids_of(asked(key))
        text = text.removesuffix("...")
        tokens = ids_of(asked(key), text)[len(head) : -1 if cut else None]
        group = groups[key]
        group.rollouts.append(
            Rollout(
                prompt_tokens=head,
                tokens=tokens,
                mask=[True] * len(tokens),
                policy_logprobs=[0.0] * len(tokens),
                sampling_logprobs=[0.0] * len(tokens),
                finish_reason="length" if cut else "stop",
                text=text,
                sample=len(group.rollouts),
                reward=Reward(value, correct=correct),
            )
        )
    return list(groups.values())


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def learner_of(small: Path, opened: ExitStack, **changes: Any) -> Expert:
    given: dict[str, Any] = {
        "model": str(small),
        "task": TASK,
        "num_train_prompts": 2,
        "num_prompts": 2,
        "num_generations": 4,
        "max_completion_length": 5,
        "train_steps": 1,
        "max_steps": 1,
        "learning_rate": 0.02,
        "eval_samples": 0,
        "dtype": "float32",
        "micro_batch_tokens": 70,
    }
    o = ExpertOptions(**given | changes)
    o.validate()
    return opened.enter_context(closing(Expert(o, double_policy(o))))


def likelihood(model: CausalModel, key: int, text: str) -> Tensor:
    """The log-probs of a kept sample's tokens."""
    head = ids_of(asked(key))
    whole = ids_of(asked(key), text.removesuffix("..."))
    return logps(model, whole[:-1] if text.endswith("...") else whole, len(head))


KEPT: dict[str, tuple[dict[str, Any], list[tuple[int, str]]]] = {
    "the correct ones": ({}, [(0, "aa"), (0, "b"), (0, "ccc"), (1, "f")]),
    "by reward": ({"threshold": 0.65}, [(0, "aa"), (0, "b"), (1, "f")]),
    "twice": ({"dedupe": False}, [(0, "aa"), (0, "aa"), (0, "b"), (0, "ccc"), (1, "f")]),
    "two of a prompt": ({"max_per_prompt": 2}, [(0, "aa"), (0, "b"), (1, "f")]),
    "the best of each": ({"keep": "best"}, [(0, "aa"), (1, "f")]),
    "the best half": ({"keep": "top", "keep_share": 0.5}, [(0, "aa"), (0, "b"), (1, "f")]),
    "also cut ones": ({"truncated": "terminate"}, [(0, "aa"), (0, "b"), (0, "ccc"), (0, "dddd..."), (1, "f")]),
    "less for cut ones": (
        {"truncated": "terminate", "missing_eos_penalty": 0.5, "threshold": 0.55},
        [(0, "aa"), (0, "b"), (0, "ccc"), (1, "f")],
    ),
    "less for long ones": ({"overlong_buffer": 4, "threshold": 0.2}, [(0, "aa"), (0, "b"), (1, "f")]),
}


@pytest.mark.parametrize(
    ("case", "normalizer"),
    [*((case, "token") for case in KEPT), ("the correct ones", "sample"), ("twice", "sample")],
)
def test_the_kept_are_imitated_and_no_other(case: str, normalizer: str, small: Path, opened: ExitStack) -> None:
    """token: the mean over all trained tokens; sample: the sum over tokens, over all samples, kept or not."""
    changes, kept = KEPT[case]
    learner = learner_of(small, opened, batch_size=len(kept), normalizer=normalizer, **changes)
    learner.sampler.sample = lambda step: (groups_of(SAMPLES), {})  # type: ignore[method-assign,assignment,misc]
    taken, metrics = taken_by(learner, 1)
    assert [(row.origin["prompt_key"], row.origin["completion"]) for row in learner.kept] == [
        (key, text.removesuffix("...")) for key, text in kept
    ]
    model = learner.policy.model
    return_to(model, taken[0])
    logp = [likelihood(model, *one) for one in kept]
    by_token, by_sample = -torch.cat(logp).mean(), -torch.cat(logp).sum() / len(SAMPLES)
    by_sequence = -torch.stack([x.mean() for x in logp]).mean()
    loss, other = (by_token, by_sequence) if normalizer == "token" else (by_sample, by_token)
    assert metrics[0]["loss"] == pytest.approx(loss.item())
    assert_gradient(taken[0], loss, trained(model))
    assert_other(taken[0], other, trained(model))


def test_a_round_goes_through_all_that_is_kept(small: Path, opened: ExitStack) -> None:
    """Two steps of two rows each are all four, each over its own tokens; nothing is sampled in between."""
    calls = []
    learner = learner_of(small, opened, batch_size=2, train_steps=2, max_steps=2, learning_rate=0.0)

    def sample(step: int) -> Any:
        calls.append(step)
        return groups_of(SAMPLES), {}

    learner.sampler.sample = sample  # type: ignore[method-assign,assignment]
    taken, metrics = taken_by(learner, 2)
    assert calls == [0]
    model = learner.policy.model
    logp = [likelihood(model, *one) for one in KEPT["the correct ones"][1]]
    total = torch.autograd.grad(-torch.cat(logp).sum(), list(trained(model).values()))
    for name, wanted in zip(trained(model), total, strict=True):
        parts = [m["num_tokens"] * t.gradients[name] for t, m in zip(taken, metrics, strict=True)]
        torch.testing.assert_close(parts[0] + parts[1], wanted, rtol=1e-9, atol=1e-9)


OTHERS = [(0, "c", 1.0, True), (1, "ad", 1.0, True), (1, "b", 0.0, False)]


@pytest.mark.parametrize("restart", [False, True])
def test_the_second_round_samples_anew_and_starts_where_it_should(
    restart: bool, small: Path, opened: ExitStack
) -> None:
    """restart: weights, moments and schedule of the start, but the samples are the trained model's."""
    learner = learner_of(small, opened, batch_size=2, train_steps=2, max_steps=4, restart=restart)
    model, seen = learner.policy.model, []

    def sample(step: int) -> Any:
        seen.append({name: p.detach().clone() for name, p in trained(model).items()})
        return groups_of(OTHERS if step else SAMPLES), {}

    learner.sampler.sample = sample  # type: ignore[method-assign,assignment]
    taken, _ = taken_by(learner, 4)
    rates = [0.02, 0.01, 0.02, 0.01] if restart else [0.02, 0.015, 0.01, 0.005]
    assert [t.learning_rate for t in taken] == pytest.approx(rates)
    start, third = taken[0].weights, taken[2].weights
    assert not any(torch.equal(seen[1][name], start[name]) for name in start)
    for name in start:
        assert torch.equal(third[name], start[name] if restart else seen[1][name])
    counts = {float(x) for name, x in learner.optimizer.state().items() if name.endswith("|step")}
    assert counts == {2.0 if restart else 4.0}
    return_to(model, taken[2])
    assert_gradient(
        taken[2], -torch.cat([likelihood(model, 0, "c"), likelihood(model, 1, "ad")]).mean(), trained(model)
    )


@pytest.mark.parametrize("normalizer", ["token", "sample"])
def test_mixed_rows_have_their_share_of_a_batch(
    normalizer: str, small: Path, opened: ExitStack, tmp_path: Path
) -> None:
    """Half of the rows; by samples they count whole, and the kept ones by the share that is kept."""
    data = write(tmp_path / "mix.jsonl", [{"prompt": asked(7), "completion": "hhh"}])
    kept = KEPT["the correct ones"][1]
    learner = learner_of(small, opened, batch_size=8, mix_data=data, mix_ratio=0.5, normalizer=normalizer)
    learner.sampler.sample = lambda step: (groups_of(SAMPLES), {})  # type: ignore[method-assign,assignment,misc]
    taken, _ = taken_by(learner, 1)
    model = learner.policy.model
    return_to(model, taken[0])
    own = torch.cat([likelihood(model, *one) for one in kept])
    mixed = torch.cat([likelihood(model, 7, "hhh")] * 4)
    by_token = -torch.cat([own, mixed]).mean()
    by_sample = -(own.sum() * 4 / 8 + mixed.sum()) / 8
    loss, other = (by_token, by_sample) if normalizer == "token" else (by_sample, by_token)
    assert_gradient(taken[0], loss, trained(model))
    assert_other(taken[0], other, trained(model))
    assert_other(taken[0], -own.mean(), trained(model))


@pytest.mark.parametrize("restart", [False, True])
def test_every_round_is_drawn_by_the_trained_model(restart: bool, small: Path, opened: ExitStack) -> None:
    """The engine knows that the weights have moved, though the prompts are the same ones."""
    changes: dict[str, Any] = {"threshold": -1.0, "truncated": "terminate", "temperature": 0.8, "max_steps": 3}
    learner = learner_of(small, opened, restart=restart, batch_size=4, **changes)
    model, seen, held = learner.policy.model, [], sampled_by(learner)
    original = learner.sampler.sample

    def sample(step: int) -> Any:
        seen.append({name: p.detach().clone() for name, p in trained(model).items()})
        return original(step)

    learner.sampler.sample = sample  # type: ignore[method-assign]
    taken_by(learner, 3)
    versions = [{r.version for group in groups for r in group.rollouts} for groups in held]
    assert versions == ([{0}, {1}, {3}] if restart else [{0}, {1}, {2}]), "one more for every time the weights moved"
    for weights, groups in zip(seen, held, strict=True):
        with torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(weights[name])
            for r in [r for group in groups for r in group.rollouts]:
                chosen = torch.tensor(r.tokens)[:, None]
                given = logits(model, r.prompt_tokens + r.tokens, len(r.prompt_tokens)) / 0.8
                assert r.sampling_logprobs == pytest.approx(given.log_softmax(-1).gather(1, chosen)[:, 0].tolist())


def test_the_first_update_is_cut_and_decays(small: Path, opened: ExitStack) -> None:
    changes: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 0.01, "warmup_steps": 1, "max_steps": 2}
    learner = learner_of(small, opened, batch_size=4, **changes)
    learner.sampler.sample = lambda step: (groups_of(SAMPLES), {})  # type: ignore[method-assign,assignment,misc]
    taken, _ = taken_by(learner, 1)
    assert taken[0].learning_rate == pytest.approx(0.01)
    assert_first_update(
        taken[0],
        learner.optimizer.weights(),
        learner.optimizer.state(),
        max_norm=0.01,
        decay=lambda name: 0.0 if "norm" in name else 0.5,
    )


def sampling(learner: Expert, *rounds: Sequence[tuple[int, str, float | None, bool | None]]) -> list[int]:
    """Let the learner meet these samples, round by round (the last ones again and again); the steps that sampled."""
    calls: list[int] = []

    def sample(step: int) -> Any:
        calls.append(step)
        return groups_of(rounds[min(len(calls), len(rounds)) - 1]), {}

    learner.sampler.sample = sample  # type: ignore[method-assign,assignment]
    return calls


def test_only_what_was_judged_counts_and_the_report_tells_kept_from_all(small: Path, opened: ExitStack) -> None:
    """Five of seven samples have a reward; two are kept, of one of the two prompts that have a judged one."""
    samples = [
        (0, "a b", 1.0, True),
        (0, "a c...", 1.0, True),
        (0, "d", None, None),
        (0, "a b a", 0.25, False),
        (1, "b", 0.0, False),
        (1, "b", 0.5, False),
        (2, "e", None, None),
    ]
    changes: dict[str, Any] = {"truncated": "terminate", "missing_eos_penalty": 0.2, "normalizer": "sample"}
    learner = learner_of(small, opened, batch_size=2, **changes)
    sampling(learner, samples)
    taken, metrics = taken_by(learner, 1)
    expected = {
        "expert/candidates": 5,
        "expert/kept": 2,
        "expert/kept_share": 2 / 5,
        "expert/prompts_kept": 1 / 2,
        "reward": (1 + 1 + 0.25 + 0 + 0.5) / 5,
        "expert/reward_all": (1 + 0.8 + 0.25 + 0 + 0.5) / 5,
        "expert/reward_kept": (1 + 0.8) / 2,
        "rewards/missing_eos": -0.2 / 5,
        "expert/kept/distinct_1": 3 / 4,
        "expert/kept/distinct_2": 2 / 2,
        "expert/kept/unique_share": 1,
        "expert/kept/self_bleu": 0,
        "expert/all/distinct_1": 3 / 9,
        "expert/all/distinct_2": 3 / 4,
        "expert/all/unique_share": 4 / 5,
    }
    assert {name: metrics[0][name] for name in expected} == pytest.approx(expected)
    assert metrics[0]["expert/all/self_bleu"] > 0.3  # "b" is there twice
    assert [row.origin["reward"] for row in learner.kept] == pytest.approx([1.0, 0.8])
    model = learner.policy.model
    return_to(model, taken[0])
    total = -(likelihood(model, 0, "a b").sum() + likelihood(model, 0, "a c...").sum())
    assert_gradient(taken[0], total / 5, trained(model))
    assert_other(taken[0], total / 7, trained(model))


def test_what_the_environment_said_is_not_imitated(small: Path, opened: ExitStack) -> None:
    groups = groups_of([(0, "abc", 1.0, True)])
    groups[0].rollouts[0].mask = [True, False, True, True]
    learner = learner_of(small, opened, batch_size=1)
    learner.sampler.sample = lambda step: (groups, {})  # type: ignore[method-assign,assignment,misc]
    taken, metrics = taken_by(learner, 1)
    model = learner.policy.model
    return_to(model, taken[0])
    logp = likelihood(model, 0, "abc")
    assert metrics[0]["num_tokens"] == 3
    whole = metrics[0]["tokens_per_second"] * metrics[0]["seconds/update"]
    assert whole == pytest.approx(len(ids_of(asked(0), "abc")))
    assert_gradient(taken[0], -logp[[0, 2, 3]].mean(), trained(model))
    assert_other(taken[0], -logp.mean(), trained(model))


def test_mixed_rows_follow_one_another_through_steps_and_rounds(small: Path, opened: ExitStack, tmp_path: Path) -> None:
    """Two corpus rows a step, in the order that the seed gives all five, beside the one sample that is kept."""
    corpus = [(10 + i, letter * (i + 1)) for i, letter in enumerate("bcdef")]
    rows = [{"prompt": asked(key), "completion": text} for key, text in corpus]
    data = write(tmp_path / "mix.jsonl", rows)
    changes: dict[str, Any] = {"batch_size": 3, "mix_ratio": 2 / 3, "train_steps": 2, "max_steps": 4, "seed": 3}
    learner = learner_of(small, opened, mix_data=data, learning_rate=0.0, **changes)
    sampling(learner, OTHERS[1:])
    taken, _ = taken_by(learner, 4)
    model = learner.policy.model
    for one, mixed in zip(taken, batches_of(corpus, 2, 4, seed=3), strict=True):
        logp = [likelihood(model, *each) for each in [(1, "ad"), *mixed]]
        assert_gradient(one, -torch.cat(logp).mean(), trained(model))
    share = learner_of(small, opened, mix_data=data, batch_size=50, mix_ratio=0.58)
    sampling(share, OTHERS)
    share.step(0)
    assert len(share.corpus) == 29  # 50 * 0.58 < 29 in binary


def test_every_round_and_every_seed_has_its_own_order(small: Path, opened: ExitStack) -> None:
    """The same four samples kept, one a step: all of them in each round, and never in the order of another."""
    orders = []
    for seed in (0, 1):
        changes: dict[str, Any] = {"batch_size": 1, "train_steps": 4, "max_steps": 8, "seed": seed}
        learner = learner_of(small, opened, learning_rate=0.0, **changes)
        sampling(learner, SAMPLES)
        losses = [round(m["loss"], 9) for m in taken_by(learner, 8)[1]]
        orders += [tuple(losses[:4]), tuple(losses[4:])]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert len(set(orders[0])) == 4
    assert len(set(orders)) == len(orders)


def test_a_finished_run_stands_in_for_the_first_round_alone(small: Path, opened: ExitStack, tmp_path: Path) -> None:
    """Its training rollouts that have a reward, a group for each step and prompt; what it evaluated stays out."""
    masked = groups_of([(0, "abc", 0.5, True)])
    masked[0].rollouts[0].mask = [True, False, True, True]
    with Run.create(output_dir=tmp_path / "run", verb="grpo", config_toml="") as run:
        run.record_rollouts(1, groups_of([(0, "aa", 0.75, True), (0, "b", 0.75, True), (1, "f", 0.5, False)]))
        run.record_rollouts(2, masked)
        run.record_rollouts(2, groups_of([(0, "dd", 0.5, False), (2, "g", None, None)]), split="train")
        run.record_rollouts(2, groups_of([(0, "ccc", 1.0, True), (3, "h", 1.0, True)]), split="eval")
        run.record_rollouts(3, groups_of([(4, "i", 0.0, False)] * 100))
    changes: dict[str, Any] = {"from_run": str(tmp_path / "run"), "batch_size": 3, "max_steps": 2}
    learner = learner_of(small, opened, learning_rate=0.0, **changes)
    calls = sampling(learner, OTHERS)
    taken, metrics = taken_by(learner, 1)
    model = learner.policy.model
    found = [(row.origin["completion"], row.origin["step"], row.origin["rollout"]) for row in learner.kept]
    assert found == [("aa", 1, 1), ("b", 1, 2), ("abc", 2, 4)]
    assert metrics[0]["expert/candidates"] == 105
    assert metrics[0]["frac_reward_zero_std"] == 1.0, "of a prompt each step's rewards are all alike"
    logp = [likelihood(model, 0, "aa"), likelihood(model, 0, "b"), likelihood(model, 0, "abc")[[0, 2, 3]]]
    assert_gradient(taken[0], -torch.cat(logp).mean(), trained(model))
    assert calls == []
    learner.step(1)
    assert calls == [1], "the second round is the policy's own"
    assert [row.origin["completion"] for row in learner.kept] == ["c", "ad"]


def test_mixed_rows_beyond_max_length_are_left_out(small: Path, opened: ExitStack, tmp_path: Path) -> None:
    rows = [{"prompt": asked(7), "completion": "h" * n} for n in (3, 9)]
    data = write(tmp_path / "mix.jsonl", rows)
    longest = len(ids_of(asked(7), "h" * 9)) + 1  # the template's last newline
    for given, kept in ((longest, 2), (longest - 1, 1)):
        learner = learner_of(small, opened, mix_data=data, mix_ratio=0.5, max_length=given)
        assert len(learner.mix) == kept
