"""Minimum risk through whole steps: over the whole set of targets it is the risk's gradient itself, else Q's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient
from plain_kit import (
    assert_first_update,
    assert_other,
    batches_of,
    logps,
    return_to,
    sampled_by,
    taken_by,
    trained,
    write,
)
from torch import Tensor

from upslope.loop.pairs import PairData, start_policy
from upslope.options import Seq2SeqOptions
from upslope.recipes.minimum_risk import MinimumRisk
from upslope.types import Reward, Rollout, RolloutGroup

pytestmark = pytest.mark.usefixtures("in_float64")

ROWS = [
    {"prompt": "a b", "completion": "b a"},
    {"prompt": "b", "completion": "b"},
    {"prompt": "a a b", "completion": "b"},
]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def learner_of(
    tmp_path: Path, opened: ExitStack, rows: list[dict[str, str]] | None = None, **changes: Any
) -> MinimumRisk:
    """An encoder-decoder of a handful of words, in float64."""
    data = write(tmp_path / "rows.jsonl", ROWS if rows is None else rows)
    shape: dict[str, Any] = {"tokenizer": "word", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 8}
    held_out = write(tmp_path / "held.jsonl", [{"prompt": "b b b", "completion": "b"}])
    common: dict[str, Any] = {"data": data, "eval_data": held_out, "eval_samples": 0, "dtype": "float32"}
    first = Seq2SeqOptions(**common, **shape)
    model = tmp_path / "model"
    pairs = PairData.of(first)
    start_policy(first, pairs, model)
    given: dict[str, Any] = {
        "model": str(model),
        "objective": "minimum_risk",
        "max_length": 8,
        "max_completion_length": 2,
        "batch_size": 2,
        "num_samples": 4,
        "alpha": 0.5,
        "max_steps": 2,
        "learning_rate": 0.02,
        "micro_batch_tokens": 30,
    }
    o = Seq2SeqOptions(**common, **given | changes)
    o.validate()
    policy = start_policy(o, pairs, tmp_path / "unused")
    policy.model.double()
    draw = torch.Generator().manual_seed(2)
    for p in policy.model.parameters():  # far from uniform
        p.data += 0.3 * torch.randn(p.shape, generator=draw)
    return opened.enter_context(closing(MinimumRisk(o, policy, pairs)))


def risk(logp_G: Tensor, costs_G: Tensor, alpha: float) -> Tensor:
    """Equation 9: the mean cost under P^alpha over the set."""
    q = (alpha * logp_G).exp()
    return (q / q.sum() * costs_G).sum()


def target_logps(learner: MinimumRisk, prompt: list[int], targets: list[list[int]]) -> Tensor:
    """Of whole targets."""
    return torch.stack([logps(learner.policy.model, prompt + y, len(prompt)).sum() for y in targets])


def cost_of(target: list[int]) -> float:
    """Some cost, another one for every target."""
    return (7 * sum((i + 2) * t for i, t in enumerate(target)) % 11) / 11


def test_over_all_targets_it_is_the_risk(tmp_path: Path, opened: ExitStack) -> None:
    """With alpha = 1, Q over every possible target is P itself; what is drawn twice, the reference too, counts once."""
    rows = [{"prompt": source, "completion": text} for source, text in (("a b", "b"), ("b", "a"), ("a a b", "b"))]
    learner = learner_of(tmp_path, opened, rows, alpha=1.0, max_steps=1)
    tokenizer, vocab = learner.policy.tokenizer, learner.policy.model.spec.vocab_size
    eos = tokenizer.eos_token_id
    targets = [[eos], *([x, y] for x, y in itertools.product(range(vocab), repeat=2) if x != eos)]
    drawn = [*targets[3:], *targets[:5], *targets[:2]]

    def sample(prompts: Any, step: int) -> Any:
        groups = []
        for prompt in prompts:
            head = tokenizer.source_ids(prompt.text)
            rollouts = [
                Rollout(head, y, [True] * len(y), [0.0] * len(y), [0.0] * len(y), "stop", "", i)
                for i, y in enumerate(drawn)
            ]
            for rollout in rollouts:
                rollout.reward = Reward(1 - cost_of(rollout.tokens))
            groups.append(RolloutGroup(prompt, rollouts))
        return groups, {}

    learner.sample = sample  # type: ignore[method-assign,assignment]
    taken, metrics = taken_by(learner, 1)
    return_to(learner.policy.model, taken[0])
    risks, alike = [], []
    for row in batches_of([p.text for p, _ in learner.prompts], 2, 1)[0]:
        head = tokenizer.source_ids(row)
        logp, costs = target_logps(learner, head, targets), torch.tensor([cost_of(y) for y in targets])
        assert float(logp.exp().sum().detach()) == pytest.approx(1.0), "these are all"
        risks.append((logp.exp() * costs).sum())
        again = [targets.index(y) for y in drawn]
        alike.append(risk(logp[again], costs[again], 1.0))
    named = trained(learner.policy.model)
    assert metrics[0]["risk/distinct"] == len(targets)
    assert metrics[0]["loss"] == pytest.approx(torch.stack(risks).mean().item(), rel=1e-6)
    assert_gradient(taken[0], torch.stack(risks).mean(), named, tolerance=1e-6)
    assert_other(taken[0], torch.stack(alike).mean(), named)


@pytest.mark.parametrize("reference", [True, False], ids=["with the reference", "without"])
def test_two_steps_over_sampled_sets(reference: bool, tmp_path: Path, opened: ExitStack) -> None:
    """The second step's set is drawn by the moved model; its costs are the task's, 1 - reward."""
    learner = learner_of(tmp_path, opened, include_reference=reference, num_samples=6 if reference else 24)
    model, tokenizer, seen = learner.policy.model, learner.policy.tokenizer, sampled_by(learner)
    taken, metrics = taken_by(learner, 2)
    assert [t.learning_rate for t in taken] == pytest.approx([0.02, 0.01])
    assert [{r.version for g in groups for r in g.rollouts} for groups in seen] == [{0}, {1}]
    for one, said, groups in zip(taken, metrics, seen, strict=True):
        return_to(model, one)
        sets: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            head = tokenizer.source_ids(group.prompt.text)
            assert len(group.rollouts) == learner.options.num_samples
            found: dict[tuple[int, ...], float] = {}
            for r in group.rollouts:
                found[tuple(r.tokens)] = 1 - float(r.reward.value or 0.0)
                drawn = logps(model, head + r.tokens, len(head)).tolist()
                assert r.sampling_logprobs == pytest.approx(drawn), "the present model's own distribution"
            if reference:
                (text,) = [row["completion"] for row in ROWS if row["prompt"] == group.prompt.text]
                found[tuple(tokenizer.target_ids(text))] = 0.0
            sets.append((target_logps(learner, head, [list(y) for y in found]), torch.tensor(list(found.values()))))
        loss = torch.stack([risk(*s, 0.5) for s in sets]).mean()
        assert said["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert_gradient(one, loss, trained(model), tolerance=1e-6)
    assert_other(taken[1], torch.stack([risk(*s, 5e-3) for s in sets]).mean(), trained(model))
    assert_other(taken[1], torch.stack([risk(p, 1 - c, 0.5) for p, c in sets]).mean(), trained(model))


def test_each_step_draws_other_targets(tmp_path: Path, opened: ExitStack) -> None:
    learner = learner_of(tmp_path, opened, batch_size=3, num_samples=6, max_completion_length=6, learning_rate=0.0)
    seen = sampled_by(learner)
    taken_by(learner, 2)
    first, second = ({g.prompt.key: [r.tokens for r in g.rollouts] for g in groups} for groups in seen)
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)


def test_the_reference_is_a_source_s_first_target(tmp_path: Path, opened: ExitStack) -> None:
    """A source with several targets is one source, and the nearest of them judges."""
    rows = [{"prompt": "a b", "completion": text} for text in ("b a", "a", "b")]
    learner = learner_of(tmp_path, opened, rows, max_completion_length=6, batch_size=1)
    ((prompt, tokens),) = learner.prompts
    assert prompt.text == "a b"
    assert tokens == learner.policy.tokenizer.target_ids("b a")


def test_another_reward_is_the_cost_that_is_lowered(tmp_path: Path, opened: ExitStack) -> None:
    """Two words are what is wanted, whatever the references say; the reference is judged by it, too."""
    learner = learner_of(tmp_path, opened, reward=("length:target=2",), max_steps=1, num_samples=12)
    seen = sampled_by(learner)
    taken, metrics = taken_by(learner, 1)
    return_to(learner.policy.model, taken[0])
    tokenizer, losses, wishes = learner.policy.tokenizer, [], set()
    for group in seen[0]:
        (text,) = [row["completion"] for row in ROWS if row["prompt"] == group.prompt.text]
        words = {tuple(r.tokens): len(r.text.split()) for r in group.rollouts}
        words[tuple(tokenizer.target_ids(text))] = len(text.split())
        costs = [abs(count - 2) / 2 for count in words.values()]
        wishes |= set(costs)
        logp = target_logps(learner, tokenizer.source_ids(group.prompt.text), [list(y) for y in words])
        losses.append(risk(logp, torch.tensor(costs), 0.5))
    assert len(wishes) > 1
    loss = torch.stack(losses).mean()
    assert metrics[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_gradient(taken[0], loss, trained(learner.policy.model), tolerance=1e-6)


def test_the_first_update_is_cut_and_decays(tmp_path: Path, opened: ExitStack) -> None:
    changes: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 1e-4, "warmup_steps": 1, "alpha": 1.0}
    learner = learner_of(tmp_path, opened, **changes)
    taken, _ = taken_by(learner, 1)
    assert taken[0].learning_rate == pytest.approx(0.01)
    vectors = {name for name, p in learner.policy.model.named_parameters() if p.dim() == 1}
    assert_first_update(
        taken[0],
        learner.optimizer.weights(),
        learner.optimizer.state(),
        max_norm=1e-4,
        decay=lambda name: 0.0 if name in vectors else 0.5,
    )
