"""Preference losses through whole steps: what the optimizer receives is the papers' gradient, each option at work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kit import assert_gradient
from plain_kit import (
    answer_logps,
    asked,
    assert_first_update,
    assert_other,
    batches_of,
    double_model,
    double_policy,
    return_to,
    taken_by,
    trained,
    write,
)
from torch import Tensor

from upslope.evaluation.measurement import bootstrap_mean
from upslope.loop.preferences import right_of
from upslope.models.protocol import CausalModel
from upslope.options import DPOOptions
from upslope.recipes.dpo import DPO

pytestmark = pytest.mark.usefixtures("in_float64")

PAIRS = [
    {"prompt": asked(1), "chosen": "aab", "rejected": "b"},
    {"prompt": asked(22), "chosen": "c", "rejected": "bbbaa"},
    {"prompt": asked(1), "chosen": "cc", "rejected": "abac"},
    {"prompt": asked(333), "chosen": "dab", "rejected": "dad"},
    {"prompt": asked(4), "chosen": "ddddd", "rejected": "a"},
]
LABELLED = [
    {"prompt": asked(1), "completion": "aab", "label": True},
    {"prompt": asked(1), "completion": "b", "label": False},
    {"prompt": asked(22), "completion": "bbbaa", "label": False},
    {"prompt": asked(333), "completion": "dab", "label": True},
    {"prompt": asked(4), "completion": "ccdd", "label": False},
]
NEXT = {0: 2, 1: 2, 2: 3, 3: 4, 4: 0}
"""Whose answer is put to each labelled row's prompt: that of the next row with another prompt."""
Numbers = dict[str, float]


def learner_of(small: Path, tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> DPO:
    given: dict[str, Any] = {
        "model": str(small),
        "data": write(tmp_path / "rows.jsonl", rows),
        "batch_size": 3,
        "max_steps": 2,
        "learning_rate": 0.02,
        "eval_samples": 0,
        "dtype": "float32",
        "micro_batch_tokens": 70,
    }
    o = DPOOptions(**given | changes)
    o.validate()
    return DPO(o, double_policy(o))


def logsig(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log1p(-mean.exp())


def by_dpo(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    h = n["beta"] * ((w.sum() - rw.sum()) - (v.sum() - rv.sum()))
    e = n.get("label_smoothing", 0.0)
    return -(1 - e) * logsig(h) - e * logsig(-h) - n.get("sft_coef", 0.0) * w.mean()


def by_ipo(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    h = (w.sum() - rw.sum()) - (v.sum() - rv.sum())
    return (h - 1 / (2 * n["beta"])) ** 2 - n.get("sft_coef", 0.0) * w.mean()


def by_orpo(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    return -w.mean() - n["beta"] * logsig(log_odds(w.mean()) - log_odds(v.mean()))


def by_simpo(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    margin = n["beta"] * (w.mean() - v.mean()) - n["margin"]
    return -logsig(margin) - n.get("sft_coef", 0.0) * w.mean()


def by_means(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    """Of DPO or IPO with the log-probs averaged over tokens, as they are not."""
    one = torch.ones(1)
    return (by_dpo if n.get("dpo") else by_ipo)(w.mean() * one, v.mean() * one, rw.mean() * one, rv.mean() * one, n)


def by_sums(w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, n: Numbers) -> Tensor:
    """Of ORPO's log-likelihood with the sum over tokens, as it is not."""
    return -w.sum() - n["beta"] * logsig(log_odds(w.mean()) - log_odds(v.mean()))


Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Numbers], Tensor]
CASES: dict[str, tuple[dict[str, Any], Formula, Numbers, list[tuple[Formula, Numbers]]]] = {
    "dpo": (
        {"beta": 0.3},
        by_dpo,
        {"beta": 0.3},
        [(by_dpo, {"beta": 0.1}), (by_means, {"beta": 0.3, "dpo": 1.0})],
    ),
    "dpo by default": ({}, by_dpo, {"beta": 0.1}, [(by_dpo, {"beta": 0.2})]),
    "cdpo": ({"label_smoothing": 0.2}, by_dpo, {"beta": 0.1, "label_smoothing": 0.2}, [(by_dpo, {"beta": 0.1})]),
    "rpo": ({"sft_coef": 0.7}, by_dpo, {"beta": 0.1, "sft_coef": 0.7}, [(by_dpo, {"beta": 0.1})]),
    "ipo": (
        {"loss": "ipo", "beta": 0.2, "sft_coef": 9.0},
        by_ipo,
        {"beta": 0.2, "sft_coef": 9.0},
        [(by_ipo, {"beta": 0.1, "sft_coef": 9.0}), (by_ipo, {"beta": 0.2}), (by_means, {"beta": 0.2})],
    ),
    "orpo": (
        {"loss": "orpo", "beta": 0.4},
        by_orpo,
        {"beta": 0.4},
        [(by_orpo, {"beta": 0.1}), (by_orpo, {"beta": 0.0}), (by_sums, {"beta": 0.4})],
    ),
    "simpo": (
        {"loss": "simpo", "beta": 2.0, "margin": 0.5, "sft_coef": 0.7},
        by_simpo,
        {"beta": 2.0, "margin": 0.5, "sft_coef": 0.7},
        [
            (by_simpo, {"beta": 2.5, "margin": 0.5, "sft_coef": 0.7}),
            (by_simpo, {"beta": 2.0, "margin": 1.375, "sft_coef": 0.7}),
            (by_simpo, {"beta": 2.0, "margin": 0.5}),
        ],
    ),
    "simpo by default": (
        {"loss": "simpo"},
        by_simpo,
        {"beta": 2.5, "margin": 1.375},
        [(by_simpo, {"beta": 2.5, "margin": 0.0}), (by_simpo, {"beta": 0.1, "margin": 1.375})],
    ),
}


def sides(rows: Sequence[dict[str, Any]], model: CausalModel, reference: CausalModel) -> list[list[Tensor]]:
    """Of each pair the log-probs of chosen and rejected tokens, under the model and under the reference."""
    found = []
    for row in rows:
        w, v = (answer_logps(model, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        with torch.no_grad():
            rw, rv = (answer_logps(reference, row["prompt"], row[side]) for side in ("chosen", "rejected"))
        found.append([w, v, rw, rv])
    return found


def over_pairs(formula: Formula, numbers: Numbers, parts: list[list[Tensor]]) -> Tensor:
    """The formula's mean over pairs."""
    return torch.stack([formula(w, v, rw, rv, numbers) for w, v, rw, rv in parts]).mean()


@pytest.mark.parametrize("case", CASES)
def test_two_steps_take_the_papers_gradients(case: str, small: Path, tmp_path: Path) -> None:
    """The second step crosses the data's end; the reference is still the model before the first."""
    changes, formula, numbers, others = CASES[case]
    learner = learner_of(small, tmp_path, PAIRS, **changes)
    model = learner.policy.model
    start = copy.deepcopy(model)
    taken, metrics = taken_by(learner, 2)
    assert [t.learning_rate for t in taken] == pytest.approx([0.02, 0.01])
    for one, rows, said in zip(taken, batches_of(PAIRS, 3, 2), metrics, strict=True):
        return_to(model, one)
        parts = sides(rows, model, start)
        loss = over_pairs(formula, numbers, parts)
        assert said["loss"] == pytest.approx(loss.item())
        assert_gradient(one, loss, trained(model))
    fresh = [[w, v, w.detach(), v.detach()] for w, v, _, _ in parts]  # were the reference the present weights
    if changes.get("loss", "dpo") in ("dpo", "ipo"):
        assert_other(taken[1], over_pairs(formula, numbers, fresh), trained(model))
    for other, wrong in others:
        assert_other(taken[1], over_pairs(other, wrong, parts), trained(model))
    swapped = [[v, w, rv, rw] for w, v, rw, rv in parts]
    assert_other(taken[1], over_pairs(formula, numbers, swapped), trained(model))
    check_pair_metrics(metrics[1], parts, numbers["beta"], changes.get("loss", "dpo"))


def check_pair_metrics(said: dict[str, float], parts: list[list[Tensor]], beta: float, loss: str) -> None:
    """Rewards are beta times what the loss compares; accuracy is how often the chosen one's is higher."""
    if loss in ("dpo", "ipo"):
        rewards = [
            ((beta * (w.sum() - rw.sum())).item(), (beta * (v.sum() - rv.sum())).item()) for w, v, rw, rv in parts
        ]
        logps = [(w.sum().item(), v.sum().item()) for w, v, _, _ in parts]
    else:
        rewards = [((beta * w.mean()).item(), (beta * v.mean()).item()) for w, v, _, _ in parts]
        logps = [(w.mean().item(), v.mean().item()) for w, v, _, _ in parts]
    n = len(parts)
    expected = {
        "rewards/chosen": sum(w for w, _ in rewards) / n,
        "rewards/rejected": sum(v for _, v in rewards) / n,
        "rewards/margins": sum(w - v for w, v in rewards) / n,
        "rewards/accuracies": sum(w > v for w, v in rewards) / n,
        "logps/chosen": sum(w for w, _ in logps) / n,
        "logps/rejected": sum(v for _, v in logps) / n,
    }
    assert {name: said[name] for name in expected} == pytest.approx(expected)


def labels_loss(
    parts: list[tuple[bool, Tensor, Tensor]], kl: Tensor, *, beta: float, good: float = 1.0, bad: float = 1.0
) -> Tensor:
    """KTO's (eq. 8) from (label, log-probs, the reference's), with z0 as it is given."""
    terms = []
    for label, y, ry in parts:
        h = y.sum() - ry.sum()
        value = good * torch.sigmoid(beta * (h - kl)) if label else bad * torch.sigmoid(beta * (kl - h))
        terms.append((good if label else bad) - value)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("sign", [1, -1], ids=["kl above 0", "kl below 0"])
def test_kto_takes_the_papers_gradient(sign: int, small: Path, tmp_path: Path) -> None:
    """z0 is the mean log-ratio over the step's mismatched pairs, at least 0, and a constant."""
    given: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.6}
    learner = learner_of(small, tmp_path, LABELLED, loss="kto", learning_rate=0.002, **given)
    model = learner.policy.model
    start = copy.deepcopy(model)
    crossed = [(LABELLED[i]["prompt"], LABELLED[j]["completion"]) for i, j in NEXT.items()]
    likelihood = torch.stack([answer_logps(model, *pair).sum() for pair in crossed]).mean()
    slopes = torch.autograd.grad(likelihood, list(trained(model).values()))
    with torch.no_grad():  # before it steps: all mismatched answers are likelier, or less so
        for weight, slope in zip(trained(model).values(), slopes, strict=True):
            weight += sign * 0.02 * slope
    taken, metrics = taken_by(learner, 2)
    numbers = {"beta": 0.3, "good": 1.5, "bad": 0.6}

    def logps_of(prompt: Any, text: str) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            base = answer_logps(start, prompt, text)
        return answer_logps(model, prompt, text), base

    for one, rows, said in zip(taken, batches_of(list(range(len(LABELLED))), 3, 2), metrics, strict=True):
        return_to(model, one)
        parts = [(LABELLED[i]["label"], *logps_of(LABELLED[i]["prompt"], LABELLED[i]["completion"])) for i in rows]
        others = [logps_of(LABELLED[i]["prompt"], LABELLED[NEXT[i]]["completion"]) for i in rows]
        kl = torch.stack([y.sum() - ry.sum() for y, ry in others]).mean()
        assert float(kl.detach()) * sign > 0.2
        z = kl.detach().clamp(min=0)
        loss = labels_loss(parts, z, **numbers)
        assert said["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert said["objective/kl"] == pytest.approx(float(z), rel=1e-6)
        assert_gradient(one, loss, trained(model), tolerance=1e-5)
    for wrong in ({"beta": 0.1}, {"good": 1.0}, {"bad": 1.0}):
        assert_other(taken[1], labels_loss(parts, z, **numbers | wrong), trained(model))
    assert_other(taken[1], labels_loss(parts, kl if sign > 0 else kl.detach(), **numbers), trained(model))
    for name, label in (("chosen", True), ("rejected", False)):
        own = [0.3 * (y.sum() - ry.sum()).item() for good, y, ry in parts if good == label]
        assert metrics[1][f"rewards/{name}"] == pytest.approx(sum(own) / len(own))
    right = [((y.sum() - ry.sum()).item() > float(z)) == good for good, y, ry in parts]
    assert metrics[1]["rewards/accuracies"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_under_adapters_the_reference_is_the_model_without_them(loss: str, small: Path, tmp_path: Path) -> None:
    """Even where the adapters say something at the start; they are on again for the step."""
    o = DPOOptions(
        model=str(small),
        data=write(tmp_path / "rows.jsonl", PAIRS if loss == "dpo" else LABELLED),
        loss=loss,  # type: ignore[arg-type]
        batch_size=5,
        max_steps=1,
        beta=0.3,
        lora_rank=2,
        eval_samples=0,
        dtype="float32",
    )
    policy = double_policy(o)
    draw = torch.Generator().manual_seed(5)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:  # begins at 0
            weight.data += torch.randn(weight.shape, generator=draw)
    learner = DPO(o, policy)
    taken, _ = taken_by(learner, 1)
    base = double_model(small)
    assert all("lora" in name for name in taken[0].gradients)
    return_to(policy.model, taken[0])
    if loss == "dpo":
        parts = sides(PAIRS, policy.model, base)
        wanted = over_pairs(by_dpo, {"beta": 0.3}, parts)
        fresh = [[w, v, w.detach(), v.detach()] for w, v, _, _ in parts]
        assert_other(taken[0], over_pairs(by_dpo, {"beta": 0.3}, fresh), trained(policy.model))
    else:
        ratios, labelled = [], []
        for i, row in enumerate(LABELLED):
            for text in (row["completion"], LABELLED[NEXT[i]]["completion"]):
                with torch.no_grad():
                    before = answer_logps(base, row["prompt"], text)
                after = answer_logps(policy.model, row["prompt"], text)
                if text is row["completion"]:
                    labelled.append((row["label"], after, before))
                else:
                    ratios.append((after.sum() - before.sum()).item())
        assert len(ratios) == 5
        z = torch.tensor(max(0.0, sum(ratios) / 5))
        wanted = labels_loss(labelled, z, beta=0.3)
    assert_gradient(taken[0], wanted, trained(policy.model), tolerance=1e-5)


def test_the_first_update_is_cut_and_decays(small: Path, tmp_path: Path) -> None:
    """max_grad_norm, weight_decay (not of norms) and warm-up reach the optimizer."""
    changes: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 0.01, "warmup_steps": 1, "loss": "ipo"}
    learner = learner_of(small, tmp_path, PAIRS, **changes)
    taken, _ = taken_by(learner, 1)
    assert taken[0].learning_rate == pytest.approx(0.01)
    assert_first_update(
        taken[0],
        learner.optimizer.weights(),
        learner.optimizer.state(),
        max_norm=0.01,
        decay=lambda name: 0.0 if "norm" in name else 0.5,
    )


def test_held_out_rows_are_measured_by_the_same_formulas(small: Path, tmp_path: Path) -> None:
    """KTO's z0 of the held-out rows is over their own mismatched pairs."""
    held = [{**row, "completion": row["completion"] + "d"} for row in LABELLED[1:4]]
    learner = learner_of(
        small, tmp_path, LABELLED, loss="kto", eval_samples=9, eval_data=write(tmp_path / "held.jsonl", held)
    )
    model = learner.policy.model
    start = copy.deepcopy(model)
    taken_by(learner, 2)
    found = learner.evaluate(2)
    assert found is not None
    with torch.no_grad():
        parts = [
            (row["label"], *[answer_logps(m, row["prompt"], row["completion"]) for m in (model, start)]) for row in held
        ]
        texts = [held[(i + 1) % 3]["completion"] for i in range(3)]
        ratios = [
            answer_logps(model, row["prompt"], text).sum() - answer_logps(start, row["prompt"], text).sum()
            for row, text in zip(held, texts, strict=True)
        ]
        kl = torch.stack(ratios).mean().clamp(min=0)
        assert found.metrics["eval_loss"] == pytest.approx(float(labels_loss(parts, kl, beta=0.1)), rel=1e-5)
    assert found.metrics["objective/kl"] == pytest.approx(float(kl), rel=1e-5)
    right = sum(((y.sum() - ry.sum()).item() > float(kl)) == label for label, y, ry in parts)
    assert found.value == pytest.approx(right / 3)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto"])
def test_a_tie_is_half_a_right_judgement(loss: str, small: Path, tmp_path: Path) -> None:
    """Where all tokens are equally likely, now and under the reference, nothing is told from anything: a half."""
    pairs = [{"prompt": asked(i), "chosen": "aab", "rejected": "bcd"} for i in range(3)]
    rows = write(tmp_path / "rows.jsonl", LABELLED if loss == "kto" else pairs)
    changes: dict[str, Any] = {"loss": loss, "model": str(small), "data": rows, "eval_data": rows}
    o = DPOOptions(**changes, batch_size=3, max_steps=1, eval_samples=9, dtype="float32")
    policy = double_policy(o)
    for weight in policy.model.parameters():
        weight.data.zero_()
    learner = DPO(o, policy)
    found = learner.evaluate(0)
    assert found is not None
    assert found.metrics["accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": len(learner.held_out), "errors": 0}
    _, metrics = taken_by(learner, 1)
    assert metrics[0]["rewards/accuracies"] == 0.5


def test_the_interval_with_ties_is_that_of_eval(monkeypatch: pytest.MonkeyPatch, small: Path, tmp_path: Path) -> None:
    """Right, wrong, tied, right: 2.5 of 4, and the bootstrap over these four, not Wilson's of a rounded count."""
    rows = write(tmp_path / "rows.jsonl", PAIRS)
    o = DPOOptions(model=str(small), data=rows, eval_data=rows, batch_size=4, max_steps=1, eval_samples=4, seed=3)
    learner = DPO(o, double_policy(o))
    margins = torch.tensor([0.25, -1.0, 0.0, 1e-9])
    found = {"rewards/accuracies": right_of(margins)}
    monkeypatch.setattr(learner, "measured", lambda: (found, {"loss": 1.0, "rewards/accuracies": 0.625}))
    said = learner.evaluate(0)
    assert said is not None
    expected = bootstrap_mean([1.0, 0.0, 0.5, 1.0], seed=3)
    assert said.metrics["accuracy"] == {**expected._asdict(), "n": 4, "errors": 0}
    assert said.value == 0.625
