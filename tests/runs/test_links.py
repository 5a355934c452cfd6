"""Links, pipes and folders where files of a run must be; checkpoints that were moved to another disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from upslope.errors import RunError
from upslope.models.files.places import model_of_run, run_of
from upslope.runs import Run
from upslope.training import checkpoint

FILES = [".lock", "metrics.jsonl", "run.db", "run.db-wal", "run.db-shm", "run.db-journal"]
FILES += ["env.json", "config.toml", "summary.json"]


def make(folder: Path) -> Run:
    return Run.create(output_dir=folder, verb="sft", config_toml="max_steps = 3\n")


def pipe(path: Path, target: Path) -> None:
    os.mkfifo(path)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "a link": lambda path, target: path.symlink_to(target),
    "a folder": lambda path, target: path.mkdir(),
    "a pipe or device": pipe,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_written_through_what_is_no_plain_file(tmp_path: Path, name: str, kind: str) -> None:
    folder, target = tmp_path / "run", tmp_path / "target"
    make(folder).close()
    path = folder / name
    content = path.read_bytes() if path.exists() else b"mine"
    target.write_bytes(content + b"torn")
    path.unlink(missing_ok=True)
    KINDS[kind](path, target)
    if kind == "a link" or name != "config.toml":
        with pytest.raises(RunError, match=rf"{name}: {kind} where a plain file must be.*move it away"):
            Run.open(folder)
    else:
        with pytest.raises(RunError, match=r"no config\.toml"):
            Run.open(folder)
    assert target.read_bytes() == content + b"torn"
    path.rmdir() if kind == "a folder" else path.unlink()
    if name != "config.toml":
        Run.open(folder).close()


def test_a_link_that_appears_later_is_not_followed_either(tmp_path: Path) -> None:
    """Between the look and the opening: the kernel refuses then."""
    target = tmp_path / "target"
    target.write_text("mine")
    script = (
        "import upslope.atomic as a; a.refuse_other_than_file = lambda path: None; import upslope.runs.lines as l\n"
    )
    script += "l.refuse_other_than_file = l._repair = lambda path: None\n"
    script += f"l.MetricLines(l.Path({str(tmp_path / 'link')!r})).append({{'step': 1}})"
    (tmp_path / "link").symlink_to(target)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "RunError" in done.stderr
    assert target.read_text() == "mine"


@pytest.mark.parametrize("kind", ["a link", "a pipe or device"])
def test_a_new_run_takes_no_lock_through_a_link_or_a_pipe(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "target").write_text("mine")
    KINDS[kind](tmp_path / "run" / ".lock", tmp_path / "target")
    with pytest.raises(RunError, match=r"\.lock"):
        make(tmp_path / "run")
    assert (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize("kind", ["a folder", "a pipe or device", "a link"])
def test_a_viewer_does_not_wait_for_a_strange_lock(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "run").close()
    (tmp_path / "run" / ".lock").unlink()
    KINDS[kind](tmp_path / "run" / ".lock", tmp_path / "nowhere")
    with Run.open(tmp_path / "run", read_only=True) as viewer:
        assert viewer.writer() is None


def save(folder: Path, step: int, **options: bool) -> Path:
    return checkpoint.save(folder, step, tensors={"a": {"x": torch.tensor([step])}}, state={"step": step}, **options)


def test_a_run_and_its_checkpoints_may_lie_elsewhere(tmp_path: Path) -> None:
    """Both folders are links: saving, finding, resuming and pruning go through them."""
    make(tmp_path / "first disk").close()
    (tmp_path / "run").symlink_to(tmp_path / "first disk")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "second disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "second disk")
    with Run.open(tmp_path / "run") as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": 1.0})
            save(run.checkpoints, step, best=step == 1)
        with pytest.raises(RunError, match="this process already"):
            Run.open(tmp_path / "first disk")
    assert {path.name for path in (tmp_path / "second disk").iterdir()} == {
        "step-00000001", "step-00000003", "best", "last",
    }  # fmt: skip
    with Run.open(tmp_path / "run") as run:
        resumed = checkpoint.resume(run.checkpoints, keep_last=1)
        assert resumed is not None
        assert resumed[2] == {"step": 3}


def test_a_checkpoint_moved_away_and_linked_back_is_pruned_as_a_link(tmp_path: Path) -> None:
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    save(folder, 1)
    (folder / "step-00000001").rename(disk)
    (folder / "step-00000001").symlink_to(disk)
    resumed = checkpoint.resume(folder, keep_last=1)
    assert resumed is not None
    assert resumed[2] == {"step": 1}
    save(folder, 2)
    assert {path.name for path in folder.iterdir()} == {"step-00000002", "last"}
    assert (disk / "manifest.json").is_file(), "what was moved away by hand is deleted by hand"


@pytest.mark.parametrize("moved", ["checkpoints", "checkpoints/step-00000001"])
def test_the_model_of_a_run_knows_its_run_wherever_it_lies(tmp_path: Path, moved: str) -> None:
    with make(tmp_path / "run") as run:
        (save(run.checkpoints, 1) / "model").mkdir()
    (tmp_path / "run" / moved).rename(tmp_path / "disk")
    (tmp_path / "run" / moved).symlink_to(tmp_path / "disk")
    model = model_of_run(tmp_path / "run", print)
    assert model == tmp_path / "run" / "checkpoints" / "step-00000001" / "model"
    assert run_of(model) == tmp_path / "run"


def test_a_checkpoint_on_a_disk_that_is_not_there_is_not_taken_for_none(tmp_path: Path) -> None:
    """Else the run would begin anew, and forget all records."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    (folder / "step-00000001").rename(tmp_path / "disk")
    (folder / "step-00000001").symlink_to(tmp_path / "not mounted")
    with pytest.raises(RunError, match=r"step-00000001 is damaged \(a link to .*not mounted, where nothing is\)"):
        checkpoint.resume(folder, keep_last=1)
    save(folder, 1)
    assert checkpoint.resolve(folder).path.name == "step-00000001.1"
    assert (folder / "step-00000001").is_symlink()


def test_a_link_for_checkpoints_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run").close()
    (tmp_path / "run" / "checkpoints").rmdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(RunError, match=r"checkpoints: a link to .*not mounted, where no folder is"):
        Run.open(tmp_path / "run")
