"""A kill while a run is made: the same command starts again, and nothing of the user's is taken for a leftover."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from upslope.cli import main
from upslope.errors import RunError
from upslope.runs import folder as folder_module
from upslope.runs.folder import Run

SCRIPT = Path(__file__).with_name("kill_creation.py")
CONFIG = "max_steps = 3\n"


def make(folder: Path) -> Run:
    return Run.create(output_dir=folder, verb="sft", config_toml=CONFIG)


def script(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900)
    if done.returncode == 77:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_whatever_a_kill_leaves_the_run_is_made_or_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "describe_environment", dict)
    script("states", str(tmp_path))
    states = [path for path in tmp_path.iterdir() if path.name != "run"]
    assert len(states) > 20
    names = {name for state in states for name in files(state)}
    assert {".lock", "run.db", "run.db-journal", "run.db-wal", "env.json", "config.toml"} <= names
    for state in states:
        resumed = tmp_path / f"{state.name}-resumed"
        shutil.copytree(state, resumed)
        whole = {"env.json", "config.toml"} <= files(state).keys()
        if whole:
            with pytest.raises(RunError, match="already holds a run; continue it with --resume"):
                make(state)
        else:
            with pytest.raises(RunError, match="starts again without --resume"):
                Run.open(resumed)
        with Run.open(resumed) if whole else make(state) as run:
            run.log(1, {"loss": 1.0})
            assert (run.verb, run.config_toml, run.store.last_step()) == ("sft", CONFIG, 1)
            assert [line["step"] for line in run.metric_lines()] == [1]
            assert not list(run.folder.glob(".upslope-tmp-*"))


def test_a_resume_of_what_was_never_made_is_told_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", "--resume", "--output-dir", str(tmp_path)]) == 2
    assert "a run that was killed while it was made starts again without --resume" in capsys.readouterr().err


@pytest.mark.slow  # 650 kills
def test_a_kill_at_any_system_call_of_the_creation(tmp_path: Path) -> None:
    assert int(script("kills", str(tmp_path))) > 300


@pytest.mark.parametrize("name", [".lock", "env.json", "metrics.jsonl", "run.db", "run.db-wal", "config.toml"])
def test_files_of_the_users_that_are_named_like_a_runs_stay(tmp_path: Path, name: str) -> None:
    if name == "run.db":
        with sqlite3.connect(tmp_path / name) as mine:
            mine.execute("CREATE TABLE meta (mine)")
        mine.close()
    else:
        (tmp_path / name).write_text('{"mine": 1}')
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"choose another --output-dir"):
        make(tmp_path)
    assert files(tmp_path) == before


def test_a_folder_for_checkpoints_may_be_there_before_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(disk)
    make(tmp_path / "run").close()
    assert (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_signature_outlives_a_shorter_one(tmp_path: Path) -> None:
    """A kill between writing the new signature and cutting off the rest of a longer old one."""
    make(tmp_path).close()
    (tmp_path / "config.toml").unlink()
    with open(tmp_path / ".lock", "ab") as file:
        file.write(b'5}"started"')
    make(tmp_path).close()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_records_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with make(tmp_path / "run") as run:
            run.log(1, {"loss": 1.0})
            run.log(2, {"loss": 1.0})
            run.rewind(1)
            modes = {path.name: path.stat().st_mode & 0o777 for path in run.folder.iterdir() if path.is_file()}
    finally:
        os.umask(before)
    private = {".lock", "metrics.jsonl", "run.db", "run.db-wal", "run.db-shm"}
    assert {name: modes[name] for name in private} == dict.fromkeys(private, 0o600)
    assert modes["config.toml"] == 0o666 & ~umask
    (tmp_path / "run" / "metrics.jsonl").chmod(0o644)
    with Run.open(tmp_path / "run") as run:
        run.rewind(1)
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mode & 0o777 == 0o644, "what was opened to others stays so"
