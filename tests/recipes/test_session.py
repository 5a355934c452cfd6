"""The training loop around any recipe: which checkpoint is best, what a second costs, what a resumed run draws.

The learner here has no network: its steps draw numbers, its evaluations say what they are told to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from upslope.errors import RunError
from upslope.loop import session
from upslope.loop.kept import NO_DATA
from upslope.loop.launch import begin
from upslope.loop.session import train
from upslope.options import SFTOptions
from upslope.runs.folder import Run
from upslope.training import checkpoint
from upslope.training.stopping import Evaluation, StepResult, StopWhen


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
    common: dict[str, Any] = {"data": "owner/rows", "output_dir": str(folder), "eval_every": 1, "keep_last": 1}
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


LATE = """
import importlib, random, sys
import numpy as np, torch
import upslope.loop.session
from upslope.training.checkpoint import capture_random_state, seed_everything
def state():
    tensors, rest = capture_random_state()
    return {name: tensor.tolist() for name, tensor in tensors.items()}, rest
seed_everything(1)
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    if state() != before:
        sys.exit(f"loading {name} draws from a generator of the user's task and rewards")
"""


def test_nothing_that_is_loaded_late_draws_from_the_users_generators(tmp_path: Path) -> None:
    """A resumed run loads it again, after its generators were put back."""
    late = [
        "rich.console",
        "rich.table",
        "rich.progress",
        "transformers",
        "sacrebleu.metrics",
        "peft",
        "huggingface_hub",
    ]
    done = subprocess.run([sys.executable, "-c", LATE, *late], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow  # three processes
def test_a_learner_that_shows_a_table_resumes_with_the_same_generators(tmp_path: Path) -> None:
    """Each launch is a process of its own, as one that has loaded everything would not notice."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from test_session import Walk, go\n"
        "class Shown(Walk):\n"
        "    def evaluate(self, step):\n"
        "        import rich.console\n"
        "        return super().evaluate(step)\n"
        "go(Path(sys.argv[1]), Shown([0.1] * 4), max_steps=int(sys.argv[2]), resume=len(sys.argv) > 3)\n"
    )
    for arguments in (["whole", "4"], ["parts", "2"], ["parts", "4", "--resume"]):
        subprocess.run([sys.executable, str(script), *arguments], cwd=tmp_path, check=True, timeout=300)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    ends = [checkpoint.load(tmp_path / name / "checkpoints" / "last") for name in ("parts", "whole")]
    assert ends[0][1]["random"] == ends[1][1]["random"]
    assert all(torch.equal(tensor, ends[1][0]["random"][name]) for name, tensor in ends[0][0]["random"].items())


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda run: (run / "run.db").unlink(), {"run.db": "4 of 4 steps are missing (1 to 4)"}),
        (lambda run: (run / "run.db").write_bytes(b""), {"run.db": "4 of 4 steps are missing (1 to 4)"}),
        (lambda run: (run / "metrics.jsonl").unlink(), {"metrics.jsonl": "4 of 4 steps are missing (1 to 4)"}),
        (lambda run: cut(run / "metrics.jsonl", before=4), {"metrics.jsonl": "1 of 4 steps are missing (4 to 4)"}),
        (lambda run: None, {}),
    ],
    ids=["no database", "empty database", "no metrics", "cut metrics", "whole"],
)
def test_records_that_were_deleted_are_said_and_the_training_goes_on(
    damage: Callable[[Path], object], lost: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, values = tmp_path / "run", [0.1] * 6
    go(run, Walk(values), max_steps=4)
    go(tmp_path / "whole", Walk(values), max_steps=6)
    damage(run)
    capsys.readouterr()
    go(run, Walk(values), max_steps=6, resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "deleted or cut" in line]
    assert [line.partition(":")[0] for line in said] == [str(run / name) for name in lost]
    assert all(words in line for words, line in zip(lost.values(), said, strict=True))
    assert lines(run)[-2:] == lines(tmp_path / "whole")[-2:]
    with Run.open(run, read_only=True) as opened:
        assert (opened.verb, opened.store.last_step()) == ("sft", 6)


def cut(path: Path, before: int) -> None:
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] < before]
    path.write_text("".join(kept))


def test_deleted_checkpoints_are_no_reason_to_begin_anew(tmp_path: Path) -> None:
    """All records would be forgotten; a run that was killed before its first checkpoint does begin anew."""
    run, values = tmp_path / "run", [0.1] * 6
    go(run, Walk(values), max_steps=4, save_every=2)
    before = lines(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match=r"checkpoints: empty, though 4 steps are recorded.*put the checkpoints back"):
        go(run, Walk(values), max_steps=6, save_every=2, resume=True)
    assert lines(run) == before
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "early", Walk(values, dies_at=2), max_steps=4, save_every=3, eval_every=0)
    assert go(tmp_path / "early", Walk(values), max_steps=4, save_every=3, resume=True)["steps"] == 4


def test_records_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = tmp_path / "run" / "metrics.jsonl"
    durable, published, real_fsync, real_rename = [0], [0], os.fsync, os.replace

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
    monkeypatch.setattr(os, "replace", rename)
    go(tmp_path / "run", Walk([0.0] * 3), max_steps=3, save_every=1)
    assert published == [3]
