"""Reward models through whole steps: the gradient of the definition in trunk and head, each option at work."""

from __future__ import annotations

from collections.abc import Sequence
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
    return_to,
    states,
    taken_by,
    trained,
    write,
)
from torch import Tensor

from upslope.models.files.config_json import SCORE
from upslope.models.files.loading import load_reward_folder
from upslope.options import RewardOptions
from upslope.recipes.reward import RewardLearner

pytestmark = pytest.mark.usefixtures("in_float64")

PAIRS = [
    {"prompt": asked(1), "chosen": "aab", "rejected": "b", "margin": 0.5},
    {"prompt": asked(22), "chosen": "c", "rejected": "bbbaa"},
    {"prompt": asked(1), "chosen": "cc", "rejected": "abac", "margin": 0.0},
    {"prompt": asked(333), "chosen": "dab", "rejected": "dad", "margin": 2.5},
    {"prompt": asked(4), "chosen": "ddddd", "rejected": "a"},
]
STEPS = [
    {"prompt": asked(1), "steps": ["ab", "b", "ccc"], "labels": [1, 0, 0.25]},
    {"prompt": asked(22), "steps": ["a"], "labels": [True]},
    {"prompt": asked(1), "steps": ["c", "ad"], "labels": [0.75, 0.0]},
    {"prompt": asked(333), "steps": ["dd", "a", "b", "d"], "labels": [1, 1, 0.5, 0]},
]


def learner_of(small: Path, tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> RewardLearner:
    given: dict[str, Any] = {
        "model": str(small),
        "data": write(tmp_path / "rows.jsonl", rows),
        "batch_size": 3,
        "max_steps": 2,
        "learning_rate": 0.004,
        "eval_samples": 0,
        "dtype": "float32",
        "micro_batch_tokens": 70,
    }
    o = RewardOptions(**given | changes)
    o.validate()
    return RewardLearner(o, double_policy(o))


def parameters(learner: RewardLearner) -> dict[str, torch.nn.Parameter]:
    """Of the trunk and of the score."""
    assert learner.head is not None
    return trained(learner.policy.model) | {SCORE: learner.head.get_parameter(SCORE)}


def scores(learner: RewardLearner, prompt: Any, answer: str, *, at: int = -1) -> Tensor:
    """After a token of (prompt, answer, end of the turn): w . state."""
    assert learner.head is not None
    w = learner.head.get_parameter(SCORE)[0]
    return states(learner.policy.model, ids_of(prompt, answer))[at] @ w


def logsig(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def outcome(parts: Sequence[tuple[Tensor, Tensor, float]], centering: float) -> Tensor:
    return torch.stack([-logsig(g - b - margin) + centering * (g + b) ** 2 for g, b, margin in parts]).mean()


def back(learner: RewardLearner, taken: Any) -> None:
    """Trunk and head as they were before a step."""
    return_to(learner.policy.model, taken)
    assert learner.head is not None
    learner.head.get_parameter(SCORE).data.copy_(taken.weights[SCORE])


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_bradley_terry_with_margin_and_centering(rank: int, small: Path, tmp_path: Path) -> None:
    """A row's own margin stands in for the option, also where it is 0; the score is read at the very last token."""
    learner = learner_of(small, tmp_path, PAIRS, margin=0.7, centering=0.05, lora_rank=rank)
    taken, metrics = taken_by(learner, 2)
    assert [t.learning_rate for t in taken] == pytest.approx([0.004, 0.002])
    for one, rows, said in zip(taken, batches_of(PAIRS, 3, 2), metrics, strict=True):
        back(learner, one)
        both = [[scores(learner, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]
        parts = [(g, b, row.get("margin", 0.7)) for (g, b), row in zip(both, rows, strict=True)]
        loss = outcome(parts, 0.05)
        assert said["loss"] == pytest.approx(loss.item())
        assert_gradient(one, loss, parameters(learner))
    n = len(parts)
    assert metrics[1]["rewards/chosen"] == pytest.approx(sum(g.item() for g, _, _ in parts) / n)
    assert metrics[1]["rewards/rejected"] == pytest.approx(sum(b.item() for _, b, _ in parts) / n)
    assert metrics[1]["rewards/accuracies"] == pytest.approx(sum(g.item() > b.item() for g, b, _ in parts) / n)
    named = parameters(learner)
    assert_other(taken[1], outcome(parts, 0.0), named)
    assert_other(taken[1], outcome([(g, b, 0.7) for g, b, _ in parts], 0.05), named)
    assert_other(taken[1], outcome([(g, b, m if m != 0.7 else 0.0) for g, b, m in parts], 0.05), named)
    assert_other(taken[1], outcome([(b, g, m) for g, b, m in parts], 0.05), named)
    before = [[scores(learner, r["prompt"], r[s], at=-2) for s in ("chosen", "rejected")] for r in rows]
    early = [(g, b, m) for (g, b), (_, _, m) in zip(before, parts, strict=True)]
    assert_other(taken[1], outcome(early, 0.05), named)


def steps_of(learner: RewardLearner, row: dict[str, Any], *, late: int = 0) -> list[Tensor]:
    """A byte is a token, so step k ends with the byte after it: the newline, or for the last the end of the turn."""
    place, found = len(ids_of(row["prompt"])), []
    for step in row["steps"]:
        place += len(step)
        found.append(scores(learner, row["prompt"], "\n".join(row["steps"]), at=place - late))
        place += 1
    return found


def cross_entropy(logit: Tensor, label: float) -> Tensor:
    p = torch.sigmoid(logit)
    return -label * p.log() - (1 - label) * (1 - p).log()


@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapters"])
def test_process_labels_at_the_ends_of_steps(rank: int, small: Path, tmp_path: Path) -> None:
    """The mean is over all steps of the batch, not over solutions."""
    learner = learner_of(small, tmp_path, STEPS, kind="process", lora_rank=rank)
    taken, metrics = taken_by(learner, 2)
    for one, rows, said in zip(taken, batches_of(STEPS, 3, 2), metrics, strict=True):
        back(learner, one)
        terms = [
            [cross_entropy(x, label) for x, label in zip(steps_of(learner, row), row["labels"], strict=True)]
            for row in rows
        ]
        flat = torch.stack([x for some in terms for x in some])
        assert said["loss"] == pytest.approx(flat.mean().item())
        assert_gradient(one, flat.mean(), parameters(learner), tolerance=1e-6)
    by_solution = torch.stack([torch.stack(some).mean() for some in terms]).mean()
    assert_other(taken[1], by_solution, parameters(learner))
    early = [
        cross_entropy(x, label)
        for row in rows
        for x, label in zip(steps_of(learner, row, late=1), row["labels"], strict=True)
    ]
    assert_other(taken[1], torch.stack(early).mean(), parameters(learner))


def test_the_first_update_is_cut_and_decays_head_and_all(small: Path, tmp_path: Path) -> None:
    """max_grad_norm, weight_decay (of the head, too; not of norms) and warm-up reach the optimizer."""
    learner = learner_of(small, tmp_path, PAIRS, weight_decay=0.5, max_grad_norm=0.01, warmup_steps=1)
    taken, _ = taken_by(learner, 1)
    assert taken[0].learning_rate == pytest.approx(0.002)
    assert SCORE in taken[0].gradients
    assert_first_update(
        taken[0],
        learner.optimizer.weights(),
        learner.optimizer.state(),
        max_norm=0.01,
        decay=lambda name: 0.0 if "norm" in name else 0.5,
    )


def test_held_out_comparisons_have_their_margins(small: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", PAIRS[:3])
    learner = learner_of(small, tmp_path, PAIRS, margin=0.7, centering=0.05, eval_samples=9, eval_data=held)
    taken_by(learner, 1)
    found = learner.evaluate(1)
    assert found is not None
    with torch.no_grad():
        both = [[scores(learner, row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in PAIRS[:3]]
    parts = [(g, b, row.get("margin", 0.7)) for (g, b), row in zip(both, PAIRS, strict=False)]
    assert found.metrics["eval_loss"] == pytest.approx(outcome(parts, 0.05).item(), rel=1e-5)
    assert found.value == pytest.approx(sum(g.item() > b.item() for g, b, _ in parts) / 3)
    sure = [torch.sigmoid(g - b).item() for g, b, _ in parts]
    assert found.metrics["brier"] == pytest.approx(sum((1 - p) ** 2 for p in sure) / 3, rel=1e-5)


def test_a_tie_is_half_a_right_judgement(small: Path, tmp_path: Path) -> None:
    """A head of zeros prefers neither answer: half right, a coin's Brier score, and as right as it claims."""
    held = write(tmp_path / "held.jsonl", PAIRS)
    learner = learner_of(small, tmp_path, PAIRS, eval_samples=9, eval_data=held)
    parameters(learner)[SCORE].data.zero_()
    found = learner.evaluate(0)
    assert found is not None
    assert found.value == 0.5
    assert (found.metrics["brier"], found.metrics["calibration_error"]) == pytest.approx((0.25, 0.0))
    _, metrics = taken_by(learner, 1)
    assert metrics[0]["rewards/accuracies"] == 0.5


def test_a_step_is_right_above_a_half(small: Path, tmp_path: Path) -> None:
    """Accuracy, mean probability and Brier score are over steps; a label of 0.5 stands for a wrong step."""
    learner = learner_of(small, tmp_path, STEPS, kind="process", batch_size=4)
    p = [torch.sigmoid(x).item() for row in STEPS for x in steps_of(learner, row)]
    labels = [float(label) for row in STEPS for label in row["labels"]]
    _, metrics = taken_by(learner, 1)
    right = [(x > 0.5) == (label > 0.5) for x, label in zip(p, labels, strict=True)]
    expected = {
        "rewards/accuracies": sum(right) / len(p),
        "rewards/steps": sum(p) / len(p),
        "brier": sum((x - label) ** 2 for x, label in zip(p, labels, strict=True)) / len(p),
    }
    assert {name: metrics[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_pairs_beyond_max_length_are_left_out(small: Path, tmp_path: Path) -> None:
    lengths = [max(len(ids_of(row["prompt"], row[side])) for side in ("chosen", "rejected")) for row in PAIRS]
    longest = max(lengths)
    for given, kept in ((longest, len(PAIRS)), (longest - 1, sum(n < longest for n in lengths))):
        assert len(learner_of(small, tmp_path, PAIRS, max_length=given).units) == kept


def test_the_folder_says_how_steps_become_one_reward(small: Path, tmp_path: Path) -> None:
    for aggregate in ("min", "prod", "last"):
        learner = learner_of(small, tmp_path, STEPS, kind="process", aggregate=aggregate)
        learner.write_model(tmp_path / aggregate)
        assert load_reward_folder(tmp_path / aggregate)[2].aggregate == aggregate
