"""Two processes and one run folder, with someone who deletes the lock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from upslope.errors import RunError
from upslope.runs.folder import Run

WRITER = """
import errno, fcntl, os, sys, time
from upslope.runs.folder import Run
if sys.argv[2] == "no folder lock":
    def flock(*arguments): raise OSError(errno.EBADF, "not here")
    fcntl.flock = flock
run = Run.open(sys.argv[1])
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
for line in sys.stdin:
    try:
        run.log(int(line), {"a": 1.0})
        print("logged", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Writer:
    """A process that has the run open, and a child of it that lives on."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.child = int(self._line())

    def log(self, step: int) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{step}\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def writing(folder: Path, how: str = "") -> Iterator[Writer]:
    arguments = [sys.executable, "-c", WRITER, str(folder), how]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writer = Writer(process)
    try:
        yield writer
    finally:
        os.kill(writer.child, 9)
        process.kill()
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Run.create(output_dir=tmp_path / "run", verb="sft", config_toml="").close()
    return tmp_path / "run"


def no_folder_lock(patch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(9, "Bad file descriptor")  # what NFS says

    patch.setattr("fcntl.flock", flock)


def test_a_deleted_lock_lets_no_second_writer_in_and_is_made_again(folder: Path) -> None:
    with writing(folder) as writer:
        (folder / ".lock").unlink()
        with pytest.raises(RunError, match="is writing this run"):
            Run.open(folder)
        assert not (folder / ".lock").exists(), "a refused process leaves nothing"
        assert writer.log(1) == "logged\n"
        with Run.open(folder, read_only=True) as viewer:
            assert (viewer.writer() or {})["pid"] == writer.process.pid
        with pytest.raises(RunError, match=f"process {writer.process.pid} on .* is writing this run"):
            Run.open(folder)


def test_children_that_live_on_hold_no_lock(folder: Path) -> None:
    with writing(folder) as writer:
        assert writer.log(1) == "logged\n"
        with pytest.raises(RunError, match="is writing this run"):
            Run.open(folder)
        writer.process.kill()
        writer.process.wait()
        os.kill(writer.child, 0)
        Run.open(folder).close()


def test_one_writer_where_folders_cannot_be_locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_folder_lock(monkeypatch)
    with writing(folder, "no folder lock") as writer:
        with pytest.raises(RunError, match=f"process {writer.process.pid} on .* is writing this run"):
            Run.open(folder)
        writer.process.kill()
        writer.process.wait()
        Run.open(folder).close()


def test_where_folders_cannot_be_locked_the_first_writer_stops_before_it_mixes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder_lock(monkeypatch)
    with writing(folder, "no folder lock") as writer:
        assert writer.log(1) == "logged\n"
        (folder / ".lock").unlink()
        with Run.open(folder) as second:
            said = writer.log(2)
            assert said.startswith("RunError")
            assert ".lock: replaced while this process wrote the run" in said
            second.log(3, {"a": 1.0})
            assert [line["step"] for line in second.metric_lines()] == [1, 3]


@pytest.mark.parametrize("then", ["nothing", "another folder", "a file"])
def test_a_run_whose_folder_is_moved_away_stops_and_goes_on_there(folder: Path, then: str) -> None:
    with Run.open(folder) as run:
        run.log(1, {"a": 1.0})
        moved = Path(shutil.move(folder, folder.with_name("moved")))
        if then != "nothing":
            folder.mkdir() if then == "another folder" else folder.touch()
        for write in (lambda: run.log(2, {"a": 1.0}), run.flush, lambda: run.summary({})):
            with pytest.raises(RunError, match=f"{folder}: moved, replaced or deleted .* continue there with --resume"):
                write()
    assert not folder.exists() if then == "nothing" else not (folder / ".lock").exists()
    with Run.open(moved) as run:
        assert [line["step"] for line in run.metric_lines()] == [1]
        run.log(2, {"a": 1.0})
