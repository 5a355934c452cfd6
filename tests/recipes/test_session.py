"""The training loop around any recipe: which checkpoint is best, what a second costs, what a resumed run draws.

The learner here has no network: its steps draw numbers, its evaluations say what they are told to.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from upslope.options import SFTOptions
from upslope.recipes import session
from upslope.recipes.kept import NO_DATA
from upslope.recipes.session import Evaluation, StepResult, begin, train
from upslope.runs.folder import Run
from upslope.training.stopping import StopWhen


class Walk:
    """Adds up what it draws from the generators that a user's task may draw from."""

    account = NO_DATA

    def __init__(self, values: list[float], *, higher: bool = True, dies_at: int = -1) -> None:
        self.values, self.higher_is_better, self.dies_at = values, higher, dies_at
        self.run: Run | None = None
        self.total = torch.zeros(1, dtype=torch.float64)
        self.clock = 0.0

    def trained_on(self) -> tuple[None, Iterable[Any]]:
        return None, []

    def step(self, step: int) -> StepResult:
        if step == self.dies_at:
            raise ZeroDivisionError
        self.clock += 1.0
        drawn = {"python": random.random(), "numpy": float(np.random.random()), "torch": float(torch.rand(1))}
        self.total += sum(drawn.values())
        return StepResult({**drawn, "total": float(self.total)}, tokens=10)

    def evaluate(self, step: int) -> Evaluation:
        self.clock += 100.0
        value = self.values[step - 1] if step else 0.0
        return Evaluation("measure", {"measure": value})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"walk": {"total": self.total.clone()}}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        self.total = tensors["walk"]["total"]

    def write_model(self, folder: Path) -> None:
        (folder / "total.txt").write_text(repr(float(self.total)))


def go(folder: Path, learner: Walk, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"data": "rows.jsonl", "output_dir": str(folder), "eval_every": 1, "keep_last": 1}
    options = SFTOptions(**{**common, **changes})
    with begin(options) as begun:
        return train("sft", options, learner, begun)


def lines(folder: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in read if "eval/measure" not in line]
    return [{name: value for name, value in line.items() if name != "time"} for line in steps]


def named(folder: Path) -> dict[str, str]:
    return {name: (folder / "checkpoints" / name).resolve().name for name in ("last", "best")}


@pytest.mark.parametrize("higher", [False, True], ids=["loss", "accuracy"])
def test_best_and_patience_go_by_what_the_recipe_calls_better(higher: bool, tmp_path: Path) -> None:
    values = [3.0, 1.0, 2.0, 1.5, 0.0] if not higher else [0.2, 0.7, 0.4, 0.6, 1.0]
    summary = go(tmp_path / "run", Walk(values, higher=higher), patience=2, save_every=50)
    assert summary["steps"] == 4, "two evaluations after the best one brought nothing"
    assert summary["stopped"] == f"patience: no improvement on {values[1]} in 2 evaluations"
    assert named(tmp_path / "run") == {"last": "step-00000004", "best": "step-00000002"}
    best = tmp_path / "run" / "checkpoints" / "best" / "model" / "total.txt"
    assert best.read_text() == repr(lines(tmp_path / "run")[1]["total"])


@pytest.mark.parametrize("higher", [False, True], ids=["loss", "accuracy"])
def test_a_target_is_reached_from_its_own_side(higher: bool, tmp_path: Path) -> None:
    values = [3.0, 2.0, 1.0, 0.0] if not higher else [0.1, 0.5, 0.9, 1.0]
    summary = go(tmp_path / "run", Walk(values, higher=higher), target=values[2] * 1.0, save_every=50)
    assert summary["steps"] == 3
    assert named(tmp_path / "run") == {"last": "step-00000003", "best": "step-00000003"}


def test_the_evaluation_at_the_end_can_be_the_best(tmp_path: Path) -> None:
    """Whether others came before it or, with eval_every 0, none did."""
    for every, best in ((2, "step-00000003"), (0, "step-00000003")):
        folder = tmp_path / f"every-{every}"
        summary = go(folder, Walk([0.9, 0.1, 0.5]), max_steps=3, eval_every=every, save_every=50)
        assert summary["evaluation"] == {"measure": 0.5}
        assert named(folder) == {"last": "step-00000003", "best": best}


def test_evaluations_cost_no_seconds_and_tokens_are_those_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second, an evaluation a hundred: three seconds are three steps, thirty tokens too."""
    for name, budget in (("seconds", {"max_seconds": 3.0}), ("tokens", {"max_tokens": 30})):
        learner = Walk([0.0] * 9)
        monkeypatch.setattr(session, "StopWhen", partial(StopWhen, clock=lambda walk=learner: walk.clock))
        summary = go(tmp_path / name, learner, **budget)
        assert (summary["steps"], summary["seconds"], summary["trained_tokens"]) == (3, 3.0, 30)
        assert summary["stopped"].startswith(f"max_{name}")


def test_a_run_that_died_goes_on_as_if_it_never_had(tmp_path: Path) -> None:
    """Steps after the last checkpoint are done again: once in the records, and with the numbers drawn then."""
    values = [0.1, 0.3, 0.2, 0.1, 0.5, 0.4]
    common: dict[str, Any] = {"max_steps": 6, "save_every": 3, "eval_every": 2, "seed": 11}
    go(tmp_path / "whole", Walk(values), **common)
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "parts", Walk(values, dies_at=5), **common)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3, 4, 5]
    assert named(tmp_path / "parts")["last"] == "step-00000003"
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    summary = go(tmp_path / "parts", Walk(values), **common, resume=True)
    assert summary["trained_tokens"] == 60
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]
    assert named(tmp_path / "parts") == named(tmp_path / "whole")
    go(tmp_path / "other", Walk(values), **{**common, "seed": 12, "max_steps": 2})
    drawn = zip(lines(tmp_path / "other"), lines(tmp_path / "whole")[:2], strict=True)
    assert all(a[name] != b[name] for a, b in drawn for name in ("python", "numpy", "torch"))


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "run" / "metrics.jsonl"
    durable, published, real_fsync, real_rename = [0], [0], os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        if records.exists() and os.path.samestat(os.fstat(descriptor), records.stat()):
            durable[0] = records.stat().st_size
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        if Path(target).name.startswith("step-"):
            assert durable[0] == records.stat().st_size > 0
            published[0] += 1
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    go(tmp_path / "run", Walk([0.0] * 3), max_steps=3, save_every=1)
    assert published == [3]
