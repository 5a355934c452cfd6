"""kill -9 at every disk operation of a save, and again and again during a run: nothing is ever lost or mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from upslope.atomic import clean_leftovers
from upslope.runs.folder import Run
from upslope.training import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from kill_checkpoints import STEPS, save, state_of

SCRIPT = Path(__file__).with_name("kill_checkpoints.py")


def script(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(left: dict[str, dict[str, torch.Tensor]], right: dict[str, dict[str, torch.Tensor]]) -> bool:
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(
            a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
            for a, b in ((left[group][name], right[group][name]) for name in left[group])
        )
        for group in left
    )


def holds(path: Path, steps: set[int]) -> int:
    """The step whose complete state, bit for bit, lies at `path`; it must be one of `steps`."""
    tensors, state = checkpoint.load(path)
    step = state["step"]
    expected_tensors, expected_state = state_of(step)
    assert step in steps
    assert state == expected_state
    assert same(tensors, expected_tensors)
    target = path.resolve() if path.is_symlink() else path
    assert json.loads((target / "model" / "config.json").read_text()) == {"step": step}
    return step


def test_a_kill_at_any_disk_operation_leaves_the_old_or_the_new_checkpoint(tmp_path: Path) -> None:
    script("points", str(tmp_path))
    folders = sorted(tmp_path.iterdir())
    assert len(folders) >= 50
    seen: set[tuple[int, int, int]] = set()
    for folder in folders:
        found = checkpoint.resolve(folder)
        assert found.note == ""
        newest, last = holds(found.path, {1, 2}), holds(folder / "last", {1, 2})
        best = holds(folder / "best", {1, 2} if folder.name.endswith("best") else {1})
        assert newest >= last >= best
        seen.add((newest, last, best))
        # Settling finishes what was begun: the names agree with what lies there.
        clean_leftovers(folder, exclusive=True)
        checkpoint.settle(folder, keep_last=1)
        assert holds(folder / "last", {newest}) == newest
        best = holds(folder / "best", {newest if folder.name.endswith("best") else 1})
        assert {path.name for path in folder.iterdir()} == {
            "last", "best", f"step-{newest:08d}", f"step-{best:08d}",
        }  # fmt: skip
        # The next save works over whatever was left, and only whole checkpoints remain.
        save(folder, 3)
        assert holds(folder / "last", {3}) == 3
        kept = {path.name for path in folder.iterdir()}
        assert kept == {"last", "best", "step-00000003", f"step-{best:08d}"}
    # Kills before the rename, between it and the switch of `last`, before that of `best`, and after.
    assert seen == {(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)}


def contents(folder: Path) -> list[Any]:
    with Run.open(folder, read_only=True) as run:
        lines = [{key: value for key, value in line.items() if key != "time"} for line in run.metric_lines()]
        series = {name: [point[:2] for point in run.store.metric_series(name)] for name in run.store.metric_names()}
        rollouts = [(row.id, row.step, row.reward, row.completion) for row in run.store.rollouts(limit=-1)]
        checkpoints = [(each.path.name, each.step) for each in checkpoint.list_checkpoints(run.checkpoints)]
        return [lines, series, rollouts, checkpoints, run.result]


def test_a_run_killed_twenty_times_ends_like_one_that_never_was(tmp_path: Path) -> None:
    kills, seed = 0, 0
    while kills < 20:
        root = tmp_path / str(seed)
        root.mkdir()
        kills += int(script("run", str(root), str(seed)))
        straight, killed = root / "straight", root / "killed"
        assert contents(killed) == contents(straight)
        assert len(contents(straight)[0]) == STEPS
        for name in ("last", "best"):
            expected, expected_state = checkpoint.load(straight / "checkpoints" / name)
            tensors, state = checkpoint.load(killed / "checkpoints" / name)
            assert same(tensors, expected)
            assert state == expected_state
        seed += 1
    print(f"{kills} kills in {seed} runs")
