"""Label smoothing and DFT inside the sft recipe: the gradient by the definition, and nothing changed when off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from upslope.build import load_policy
from upslope.data.batching import collate
from upslope.errors import ConfigError
from upslope.models.attention.context import PackedContext
from upslope.models.files.weights import load as load_weights
from upslope.options import SFTOptions
from upslope.recipes.sft import SFT, sft
from upslope.training.step import Forward, accumulate
from upslope.types import Batch, Example


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Say {i}", "completion": "abc"[i % 3] * (1 + i % 4)} for i in range(12)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def options(tiny: Path, rows: Path, folder: Path, **changes: Any) -> SFTOptions:
    common: dict[str, Any] = {
        "model": str(tiny),
        "data": str(rows),
        "output_dir": str(folder),
        "batch_size": 4,
        "max_steps": 3,
        "eval_every": 0,
        "learning_rate": 1e-2,
        "dtype": "float32",
    }
    made = SFTOptions(**{**common, **changes})
    made.validate()
    return made


def by_definition(model: Any, batch: Batch, loss: str, smoothing: float) -> Tensor:
    """The batch's loss from full float64 logits: cross-entropy with smoothed one-hot targets, or DFT's weights."""
    hidden = model(batch.tokens_T, PackedContext(batch.lengths, batch.parents, device="cpu"))
    logp = torch.log_softmax(hidden[batch.rows_N] @ model.head_weight.T, dim=-1)
    targets = torch.nn.functional.one_hot(batch.targets_N, logp.shape[1]).double()
    if loss == "dft":
        taken = (logp * targets).sum(-1)
        return (-taken.exp().detach() * taken).sum() / len(taken)
    targets = (1 - smoothing) * targets + smoothing / logp.shape[1]
    return -(targets * logp).sum() / logp.shape[0]


@pytest.mark.parametrize(("loss", "smoothing"), [("nll", 0.0), ("nll", 0.1), ("nll", 1.0), ("dft", 0.0)])
def test_gradient_is_the_definitions_however_the_batch_is_cut(
    loss: str, smoothing: float, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    o = options(tiny, rows, tmp_path / "run", loss=loss, label_smoothing=smoothing)
    learner = SFT(o, load_policy(o))
    model = learner.policy.model.double()
    examples = learner.train_examples[:5]
    trained = sum(sum(e.mask) for e in examples)
    weighted = [
        Example(e.tokens, e.mask, {"weight": torch.full((sum(e.mask),), 1 / trained, dtype=torch.float64)})
        for e in examples
    ]
    whole = collate(weighted)
    value = by_definition(model, whole, loss, smoothing)
    value.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for parts in ([[0, 1, 2, 3, 4]], [[4], [1, 0], [2, 3]]):
        model.zero_grad()
        batches = [collate([weighted[i] for i in part]) for part in parts]
        totals = accumulate(model, batches, learner.likelihood, Forward(mean_logp=smoothing > 0))
        assert totals["loss"] == pytest.approx(value.item(), abs=1e-12)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-12)


def test_the_step_reports_the_mean_over_the_vocabulary_and_the_entropy_together(tiny: Path, rows: Path) -> None:
    o = options(tiny, rows, Path("unused"))
    learner = SFT(o, load_policy(o))
    batch = collate(learner.train_examples[:3])
    both = Forward(entropy=True, mean_logp=True)(learner.policy.model, batch)
    plain = Forward()(learner.policy.model, batch)
    assert "mean_logp_N" not in plain
    assert "entropy_N" not in plain
    assert torch.equal(both.logp_N, plain.logp_N)
    assert torch.equal(both.entropy_N, Forward(entropy=True)(learner.policy.model, batch).entropy_N)
    alone = Forward(mean_logp=True)(learner.policy.model, batch)
    assert torch.equal(both.mean_logp_N, alone.mean_logp_N)
    assert "entropy_N" not in alone
    assert bool((both.mean_logp_N <= -math.log(258) + 1e-5).all())  # the mean of logs is at most the log of 1 / V


def weights_after(o: SFTOptions) -> dict[str, Tensor]:
    summary = sft(o)
    return load_weights(Path(summary["model"]), torch.float32)


def test_smoothing_zero_changes_no_bit_and_the_others_do(tiny: Path, rows: Path, tmp_path: Path) -> None:
    plain = weights_after(options(tiny, rows, tmp_path / "plain"))
    zero = weights_after(options(tiny, rows, tmp_path / "zero", loss="nll", label_smoothing=0.0))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    for name, change in (("smooth", {"label_smoothing": 0.1}), ("dft", {"loss": "dft"})):
        other = weights_after(options(tiny, rows, tmp_path / name, **change))
        assert any(not torch.equal(plain[key], other[key]) for key in plain)
        line = next(x for x in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "loss" in x)
        assert line["loss/nll"] != line["loss"]


@pytest.mark.parametrize("change", [{"label_smoothing": 0.1}, {"loss": "dft"}])
def test_both_learn(change: dict[str, Any], tiny: Path, rows: Path, tmp_path: Path) -> None:
    sft(options(tiny, rows, tmp_path / "run", max_steps=20, **change))
    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"eval/' not in line
    ]
    assert lines[-1]["loss/nll"] < 0.7 * lines[0]["loss/nll"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss": "dft"}, "dft"),
    ],
)
def test_wrong_values_are_one_clear_line(change: dict[str, Any], said: str, tiny: Path, rows: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        options(tiny, rows, Path("unused"), **change)
    assert "\n" not in str(caught.value)
