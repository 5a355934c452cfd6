"""Preference losses through the whole recipe: the gradient of the definition, exactly, however the batch is split."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_kit import Oracle, asked, labelled_rows, pair_rows, relative_gap, write
from test_recipes import lines
from test_resume import assert_same, comparable
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.cli import main
from upslope.errors import ConfigError, DataError, RunError, UpslopeError
from upslope.models.files.weights import load as load_weights
from upslope.options import DPOOptions
from upslope.recipes.dpo import DPO, dpo
from upslope.training.step import accumulate, unit_batches

TWO = [
    {"prompt": asked(1), "chosen": "aab", "rejected": "b"},
    {"prompt": asked(22), "chosen": "c", "rejected": "bbbaa"},
]
LABELLED = [
    {"prompt": asked(1), "completion": "aab", "label": True},
    {"prompt": asked(22), "completion": "bbbaa", "label": False},
]


def options(tiny: Path, data: str, folder: Path, **changes: Any) -> DPOOptions:
    common: dict[str, Any] = {
        "model": str(tiny),
        "data": data,
        "output_dir": str(folder),
        "batch_size": 8,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "eval_every": 0,
        "dtype": "float32",
    }
    return DPOOptions(**(common | changes))


def moved(policy: Policy) -> None:
    """Weights away from the start, so that no log-ratio is 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def gradient(learner: DPO, budget: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of one step over all rows, in micro-batches of `budget` tokens."""
    learner.optimizer.zero_grad()
    indices = list(range(len(learner.units)))
    loss, numbers = learner.loss_of(learner.units, indices)
    metrics = accumulate(learner.policy.model, unit_batches(learner.units, budget), loss)
    return {n: g.clone() for n, g in learner.optimizer.gradients().items()}, metrics | numbers


def logsig(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def odds(mean: Tensor) -> Tensor:
    return torch.log(mean.exp() / (1 - mean.exp()))


def by_pairs(formula: Callable[..., Tensor]) -> Callable[[Oracle, Oracle], Tensor]:
    def loss(policy: Oracle, ref: Oracle) -> Tensor:
        terms = []
        for row in TWO:
            w, v = (policy.logps(row["prompt"], row[side]) for side in ("chosen", "rejected"))
            with torch.no_grad():
                rw, rv = (ref.logps(row["prompt"], row[side]) for side in ("chosen", "rejected"))
            terms.append(formula(w, v, w.sum() - rw.sum() - v.sum() + rv.sum()))
        return sum(terms) / len(terms)  # type: ignore[return-value]

    return loss


def kto_loss(policy: Oracle, ref: Oracle) -> Tensor:
    """beta 0.3, weights 1.5 and 0.5; the mismatched pairs are each prompt with the other row's answer."""

    def ratio(prompt: Any, text: str) -> Tensor:
        with torch.no_grad():
            base = ref.logps(prompt, text).sum()
        return policy.logps(prompt, text).sum() - base

    first, second = LABELLED
    kl = (ratio(first["prompt"], second["completion"]) + ratio(second["prompt"], first["completion"])) / 2
    z = kl.detach().clamp(min=0)
    good = 1.5 * (1 - torch.sigmoid(0.3 * (ratio(first["prompt"], first["completion"]) - z)))
    bad = 0.5 * (1 - torch.sigmoid(0.3 * (z - ratio(second["prompt"], second["completion"]))))
    return (good + bad) / 2


CASES: dict[str, tuple[dict[str, Any], Callable[[Oracle, Oracle], Tensor]]] = {
    "dpo": ({"beta": 0.3}, by_pairs(lambda w, v, h: -logsig(0.3 * h))),
    "cdpo": (
        {"label_smoothing": 0.2},
        by_pairs(lambda w, v, h: -0.8 * logsig(0.1 * h) - 0.2 * logsig(-0.1 * h)),
    ),
    "rpo": ({"sft_coef": 0.7}, by_pairs(lambda w, v, h: -logsig(0.1 * h) - 0.7 * w.mean())),
    "ipo": ({"loss": "ipo", "beta": 0.2}, by_pairs(lambda w, v, h: (h - 2.5) ** 2)),
    "orpo": (
        {"loss": "orpo", "beta": 0.4},
        by_pairs(lambda w, v, h: -w.mean() - 0.4 * logsig(odds(w.mean()) - odds(v.mean()))),
    ),
    "simpo": (
        {"loss": "simpo", "beta": 2.0, "margin": 0.5},
        by_pairs(lambda w, v, h: -logsig(2.0 * (w.mean() - v.mean()) - 0.5)),
    ),
    "kto": ({"loss": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}, kto_loss),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_definition_s(case: str, tiny: Path, tmp_path: Path) -> None:
    changes, definition = CASES[case]
    data = write(tmp_path / "two.jsonl", LABELLED if changes.get("loss") == "kto" else TWO)
    o = options(tiny, data, tmp_path / "run", batch_size=2, eval_samples=0, **changes)
    o.validate()
    policy = load_policy(o)
    policy.model.double()
    learner = DPO(o, policy)
    moved(policy)
    found, metrics = gradient(learner, budget=10_000)
    oracle = Oracle(tiny, policy.tokenizer, dict(policy.model.named_parameters()))
    loss = definition(oracle, Oracle(tiny, policy.tokenizer))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert relative_gap(found, oracle.gradients(loss)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_gradient_does_not_depend_on_the_micro_batches(case: str, tiny: Path, tmp_path: Path) -> None:
    changes, _ = CASES[case]
    rows = labelled_rows(12) if changes.get("loss") == "kto" else pair_rows(12)
    o = options(tiny, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", batch_size=12, eval_samples=0, **changes)
    learner = DPO(o, load_policy(o))
    moved(learner.policy)
    whole, of_whole = gradient(learner, budget=10_000)
    for budget in (1, 90):
        found, metrics = gradient(learner, budget=budget)
        assert relative_gap(found, whole) < 1e-6
        assert metrics == pytest.approx(of_whole, rel=1e-5, abs=1e-6)


def test_a_pair_is_never_split_and_shares_its_prompt(tiny: Path, tmp_path: Path) -> None:
    o = options(tiny, write(tmp_path / "two.jsonl", TWO), tmp_path / "run", eval_samples=0)
    learner = DPO(o, load_policy(o))
    batches = unit_batches(learner.units, 1)
    assert [len(batch.ends_B) for batch in batches] == [2, 2]
    assert [batch.parents for batch in batches] == [[-1, 0, 0]] * 2
    assert [int(batch.tokens_T.shape[0]) for batch in batches] == sorted(
        (u.tokens for u in learner.units), reverse=True
    )


def test_the_last_token_is_the_end_of_the_turn(tiny: Path, tmp_path: Path) -> None:
    o = options(tiny, write(tmp_path / "two.jsonl", TWO), tmp_path / "run", eval_samples=0)
    learner = DPO(o, load_policy(o))
    for unit in learner.units:
        assert [e.tokens[-1] for e in unit.examples] == [1, 1]
        assert all(e.mask[-1] for e in unit.examples)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_the_reference_is_the_start_and_stays_it(loss: str, rank: int, tiny: Path, tmp_path: Path) -> None:
    rows = labelled_rows(12) if loss == "kto" else pair_rows(12)
    o = options(tiny, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", loss=loss, lora_rank=rank)
    learner = DPO(o, load_policy(o))
    fields = [e.fields["ref_logprobs"].clone() for u in learner.units for e in u.examples]
    learner.policy.model.train()
    first = learner.step(0).metrics
    assert first["rewards/chosen"] == 0.0
    assert first["rewards/rejected"] == 0.0
    if loss == "kto":
        assert first["objective/kl"] == 0.0
    assert any(learner.step(step).metrics["rewards/margins"] != 0.0 for step in (1, 2))
    after = [e.fields["ref_logprobs"] for u in learner.units for e in u.examples]
    assert all(torch.equal(a, b) for a, b in zip(fields, after, strict=True))
    oracle = Oracle(tiny, learner.policy.tokenizer)
    row = rows[0]
    text = row["completion"] if loss == "kto" else row["chosen"]
    torch.testing.assert_close(fields[0].double(), oracle.logps(row["prompt"], text).detach(), rtol=1e-4, atol=1e-5)


def test_ipo_starts_at_the_squared_target(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", pair_rows(8))
    dpo(options(tiny, data, tmp_path / "run", loss="ipo", beta=0.1, max_steps=1))
    assert lines(tmp_path / "run")[0]["loss"] == 25.0
    dpo(options(tiny, data, tmp_path / "dpo", max_steps=1))
    assert lines(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_it_learns(loss: str, tiny: Path, tmp_path: Path) -> None:
    rows = labelled_rows(90) if loss == "kto" else pair_rows(90)
    o = options(tiny, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", loss=loss, max_steps=15)
    summary = dpo(o)
    log = lines(tmp_path / "run")
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"] + 0.1
    assert log[-1]["rewards/accuracies"] > 0.9
    found = summary["evaluation"]["accuracy"]
    assert found["value"] == 1.0
    assert 0.5 < found["low"] < found["high"] == 1.0
    assert found["n"] == 9
    assert summary["evaluation"]["eval_loss"] < log[0]["loss"]


@pytest.mark.parametrize("changes", [{}, {"loss": "kto"}, {"lora_rank": 4}, {"dtype": "bfloat16"}], ids=str)
def test_it_repeats_and_resumes_bit_for_bit(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    rows = labelled_rows(20) if changes.get("loss") == "kto" else pair_rows(20)
    data = write(tmp_path / "rows.jsonl", rows)
    for name in ("whole", "again"):
        dpo(options(tiny, data, tmp_path / name, **changes))
    dpo(options(tiny, data, tmp_path / "parts", **changes, max_steps=2))
    dpo(options(tiny, data, tmp_path / "parts", **changes, resume=True))
    expected = comparable(tmp_path / "whole")
    assert_same(comparable(tmp_path / "again"), expected)
    found = comparable(tmp_path / "parts")
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    assert found["metrics"] == expected["metrics"]


def test_a_resumed_run_may_look_at_fewer_rows_but_not_train_on_others(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", pair_rows(40))
    changes: dict[str, Any] = {"loss": "simpo", "max_steps": 1}
    assert dpo(options(tiny, data, tmp_path / "run", **changes))["evaluation"]["accuracy"]["n"] == 4
    changes |= {"resume": True, "max_steps": 2}
    summary = dpo(options(tiny, data, tmp_path / "run", **changes, eval_samples=2))
    assert summary["evaluation"]["accuracy"]["n"] == 2
    write(tmp_path / "rows.jsonl", pair_rows(50))
    with pytest.raises(RunError, match=r"rows\.jsonl \(--data\) has changed since .*step-00000002"):
        dpo(options(tiny, data, tmp_path / "run", **changes | {"max_steps": 3}))


def test_epochs_set_the_steps_and_rows_may_be_held_out_elsewhere(tiny: Path, tmp_path: Path) -> None:
    data, held = write(tmp_path / "rows.jsonl", pair_rows(20)), write(tmp_path / "held.jsonl", pair_rows(5, seed=1))
    o = options(tiny, data, tmp_path / "run", num_epochs=2, eval_data=held, loss="simpo")
    summary = dpo(o)
    assert summary["steps"] == 5
    assert summary["evaluation"]["accuracy"]["n"] == 5


def test_what_is_too_long_is_dropped_pair_by_pair_and_counted(tiny: Path, tmp_path: Path) -> None:
    rows = pair_rows(10)
    rows[3]["rejected"] = "b" * 300
    o = options(tiny, write(tmp_path / "rows.jsonl", rows), tmp_path / "run", max_length=100, max_steps=1)
    learner = DPO(o, load_policy(o))
    assert len(learner.units) + len(learner.held_out) == 9
    (said,) = learner.account.lines()
    assert "9 of 10 rows" in said
    assert "1 longer than max_length (100; the longest has 3" in said


SAME = [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "c", "rejected": "c"}]


@pytest.mark.parametrize(
    ("rows", "change", "error", "said"),
    [
        (SAME, {}, DataError, r"rows\.jsonl.*2.*same"),
        ([{"prompt": "x", "chosen": "", "rejected": "b"}], {}, DataError, r"rows\.jsonl.*1.*'chosen' is empty"),
        ([{"prompt": "x", "chosen": " ", "rejected": "b"}], {}, DataError, r"rows\.jsonl.*1.*'chosen' is empty"),
        ([{"prompt": "x", "chosen": "b"}], {}, DataError, r"rows\.jsonl.*1.*no 'rejected'"),
        ([{"prompt": "x", "completion": "b"}], {}, DataError, r"rows\.jsonl.*1.*chosen and rejected \(prompt may"),
        (pair_rows(3), {"max_length": 4}, DataError, "max_length 4"),
        (pair_rows(3), {"loss": "kto"}, DataError, r"rows\.jsonl.*1.*label"),
        ([r | {"label": True} for r in labelled_rows(3)], {"loss": "kto"}, DataError, "every row has label true"),
        ([r | {"prompt": "x"} for r in labelled_rows(4)], {"loss": "kto"}, DataError, r"rows\.jsonl.*1.*prompt"),
        (pair_rows(3), {"label_smoothing": 0.5}, ConfigError, "label_smoothing"),
        (pair_rows(3), {"loss": "ipo", "label_smoothing": 0.1}, ConfigError, "label_smoothing.*dpo"),
        (pair_rows(3), {"margin": 1.0}, ConfigError, "margin.*simpo"),
        (pair_rows(3), {"loss": "orpo", "sft_coef": 1.0}, ConfigError, "sft_coef"),
        (pair_rows(3), {"desirable_weight": 2.0}, ConfigError, "desirable_weight.*kto"),
        (pair_rows(3), {"data": None}, ConfigError, "data"),
        (pair_rows(3), {"data": "absent.jsonl"}, DataError, r"absent\.jsonl"),
        (pair_rows(3), {"beta": 0.0}, ConfigError, "beta"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_input_is_one_clear_line(
    rows: list[Any], change: dict[str, Any], error: type[Exception], said: str, tiny: Path, tmp_path: Path
) -> None:
    given = {"data": write(tmp_path / "rows.jsonl", rows), **change}
    o = options(tiny, folder=tmp_path / "run", **given)

    def checked() -> None:
        o.validate()
        dpo(o)

    with pytest.raises(error, match=said) as caught:
        checked()
    assert isinstance(caught.value, UpslopeError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_command_and_dry_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", pair_rows(20))
    words = ["dpo", "--model", str(tiny), "--data", "rows.jsonl", "--max-steps", "2", "--json", "--batch-size", "4"]
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"]["sequences_per_step"] == 8
    assert plan["prediction"]["memory_gb"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    assert main([*words, "--output-dir", "run"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 2
    weights, start = (load_weights(f, torch.float32) for f in (Path(summary["model"]), tiny))
    assert any(not torch.equal(weights[n], start[n]) for n in start)
