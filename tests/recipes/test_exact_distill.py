"""Distillation through whole steps: the divergence's gradient on what the student or the data wrote."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient
from plain_kit import (
    assert_first_update,
    assert_other,
    batches_of,
    double_policy,
    ids_of,
    logits,
    return_to,
    sampled_by,
    taken_by,
    trained,
    write,
)
from tiny_model import tiny_folder
from torch import Tensor

from upslope.options import DistillOptions
from upslope.recipes.distill import Distill

pytestmark = pytest.mark.usefixtures("in_float64")


def asked_at_length(i: int) -> list[dict[str, str]]:
    """A prompt of more than a block of the cache, so that a second answer to it may begin from what is cached."""
    return [{"role": "user", "content": f"Say {i} " + "and more " * 8}]


ANSWERS = ["aab", "b", "cdcd", "dd"]
ROWS = [{"prompt": asked_at_length(i), "completion": ANSWERS[i]} for i in range(4)]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width, with the student's vocabulary."""
    shape = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 3}
    return tiny_folder(tmp_path_factory.mktemp("models") / "guide", seed=7, **shape, num_key_value_heads=3)


def distilled(small: Path, guide: Path, tmp_path: Path, **changes: Any) -> Distill:
    given: dict[str, Any] = {
        "model": str(small),
        "teacher": str(guide),
        "data": write(tmp_path / "rows.jsonl", ROWS),
        "num_prompts": 4,
        "max_completion_length": 5,
        "max_steps": 2,
        "learning_rate": 0.02,
        "eval_samples": 0,
        "dtype": "float32",
        "micro_batch_tokens": 90,
    }
    o = DistillOptions(**given | changes)
    o.validate()
    return Distill(o, double_policy(o))


def forward(s: Tensor, t: Tensor, _: float) -> Tensor:
    return (t.exp() * (t - s)).sum(-1)


def reverse(s: Tensor, t: Tensor, _: float) -> Tensor:
    return (s.exp() * (s - t)).sum(-1)


def jsd(s: Tensor, t: Tensor, w: float) -> Tensor:
    m = (w * t.exp() + (1 - w) * s.exp()).log()
    return w * (t.exp() * (t - m)).sum(-1) + (1 - w) * (s.exp() * (s - m)).sum(-1)


Divergence = Callable[[Tensor, Tensor, float], Tensor]
KINDS: dict[str, tuple[dict[str, Any], Divergence]] = {
    "reverse": ({}, reverse),
    "forward": ({"divergence": "forward"}, forward),
    "jsd": ({"divergence": "jsd", "jsd_weight": 0.2}, jsd),
}


def values(
    both: list[tuple[Tensor, Tensor]], divergence: Divergence, w: float = 0.2, temperature: float = 0.7
) -> list[Tensor]:
    """Of every sequence's tokens, from the logits of student and teacher."""
    return [divergence((s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), w) for s, t in both]


@pytest.mark.parametrize(
    ("kind", "share"), [("reverse", 1.0), ("reverse", 0.5), ("forward", 0.5), ("forward", 0.0), ("jsd", 0.5)]
)
def test_two_steps_of_distillation(kind: str, share: float, small: Path, guide: Path, tmp_path: Path) -> None:
    """The mean over the step's tokens of the divergence at the temperature; the second step samples anew."""
    changes, divergence = KINDS[kind]
    given = {"temperature": 0.7, "num_generations": 2, "on_policy_fraction": share}
    learner = distilled(small, guide, tmp_path, **changes, **given)
    model, teacher = learner.policy.model, learner.teacher
    frozen = copy.deepcopy(teacher)
    seen = sampled_by(learner)
    taken, metrics = taken_by(learner, 2)
    assert [t.learning_rate for t in taken] == pytest.approx([0.02, 0.01])
    for one, said, groups, met in zip(taken, metrics, seen, batches_of(list(range(4)), 4, 2), strict=True):
        return_to(model, one)
        own = round(4 * share)
        rows = [(ids_of(asked_at_length(i), ANSWERS[i]), len(ids_of(asked_at_length(i)))) for i in met[own:]]
        assert [g.prompt.key for g in groups] == met[:own]
        for group in groups:
            assert len(group.rollouts) == 2
            head = ids_of(asked_at_length(group.prompt.key))
            for r in group.rollouts:
                assert r.prompt_tokens == head
                assert len(r.tokens) <= 5
                rows.append((head + r.tokens, len(head)))
                chosen = torch.tensor(r.tokens)[:, None]
                drawn = (logits(model, *rows[-1]) / 0.7).log_softmax(-1).gather(1, chosen)[:, 0]
                assert r.sampling_logprobs == pytest.approx(drawn.tolist()), "the present student, at the temperature"
        both = [(logits(model, *row), logits(frozen, *row).detach()) for row in rows]
        loss = torch.cat(values(both, divergence)).mean()
        assert said["loss"] == pytest.approx(loss.item())
        assert_gradient(one, loss, trained(model))
    assert_other(taken[1], torch.cat(values(both, divergence, temperature=1.0)).mean(), trained(model))
    if share < 1:  # the answers differ in length
        assert_other(taken[1], torch.stack([x.mean() for x in values(both, divergence)]).mean(), trained(model))
    for other in (forward, reverse, jsd):
        if other is not divergence or other is jsd:
            assert_other(taken[1], torch.cat(values(both, other, w=0.5)).mean(), trained(model))
    for before, after in zip(frozen.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(before, after)
        assert after.grad is None


def test_each_step_of_distillation_draws_other_answers(small: Path, guide: Path, tmp_path: Path) -> None:
    """Also of a prompt that a step holds twice, because the data are fewer than its prompts."""
    learner = distilled(small, guide, tmp_path, num_prompts=8, learning_rate=0.0)
    seen = sampled_by(learner)
    taken_by(learner, 2)
    drawn = [(g.prompt.key, tuple(g.rollouts[0].tokens)) for groups in seen for g in groups]
    assert len(drawn) == 16
    assert len(set(drawn)) == 16


def test_as_many_problems_of_the_task_are_distilled_on(small: Path, guide: Path, tmp_path: Path) -> None:
    learner = distilled(
        small,
        guide,
        tmp_path,
        data=None,
        task="chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1",
        num_train_prompts=7,
    )
    assert len({item.key for item in learner.items}) == 7


def test_held_out_divergence_is_per_token(small: Path, guide: Path, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", ROWS[:3])
    learner = distilled(small, guide, tmp_path, eval_data=held, eval_samples=9, divergence="forward", temperature=0.7)
    found = learner.evaluate(0)
    assert found is not None
    parts = []
    with torch.no_grad():
        for row, text in zip(ROWS[:3], ANSWERS, strict=False):
            place = (ids_of(row["prompt"], text), len(ids_of(row["prompt"])))
            s, t = ((logits(m, *place) / 0.7).log_softmax(-1) for m in (learner.policy.model, learner.teacher))
            parts.append(forward(s, t, 0.5))
    assert found.value == pytest.approx(torch.cat(parts).mean().item())


def test_the_first_update_of_distillation_is_cut_and_decays(small: Path, guide: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 0.001, "warmup_steps": 1}
    learner = distilled(small, guide, tmp_path, **changes, on_policy_fraction=0.0)
    taken, _ = taken_by(learner, 1)
    assert taken[0].learning_rate == pytest.approx(0.01)
    assert_first_update(
        taken[0],
        learner.optimizer.weights(),
        learner.optimizer.state(),
        max_norm=0.001,
        decay=lambda name: 0.0 if "norm" in name else 0.5,
    )


def test_rows_beyond_max_length_are_left_out_and_counted(small: Path, guide: Path, tmp_path: Path) -> None:
    longest = len(ids_of(ROWS[2]["prompt"], ROWS[2]["completion"])) + 1  # the template's last newline
    for given, kept in ((longest, 4), (longest - 1, 3)):
        learner = distilled(small, guide, tmp_path, on_policy_fraction=0.0, max_length=given)
        assert len(learner.items) == kept
