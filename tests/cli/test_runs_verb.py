"""`upslope runs`: every run in full, the damaged ones too; and what belongs to another verb is named."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from upslope.cli import main
from upslope.commands import runs
from upslope.runs.folder import Run

NAME = "sft-with-a-name-that-says-a-lot-about-what-was-tried-and-why-on-which-day"


def make(folder: Path, *, verb: str = "sft", steps: int = 2) -> Path:
    with Run.create(verb=verb, config_toml="max_steps = 2\n", output_dir=folder) as run:
        for step in range(1, steps + 1):
            run.log(step, {"loss": 1.0 / step})
        accuracy = {"value": 0.25, "low": 0.2, "high": 0.31, "n": 200}
        run.record_evaluation(steps, "held-out", {"eval_loss": 0.5, "accuracy": accuracy}, measure="accuracy")
    return folder


def no_toml(folder: Path) -> None:
    (folder / "config.toml").write_text("max_steps = [")


def no_text(folder: Path) -> None:
    (folder / "config.toml").write_bytes(b"\xff\xfe\x00")


def no_database(folder: Path) -> None:
    (folder / "run.db").write_bytes(os.urandom(5000))
    for path in folder.glob("run.db-*"):
        path.unlink()


def no_summary(folder: Path) -> None:
    (folder / "summary.json").write_bytes(b"\x80\x81")


def no_lines(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("[]\n")


def no_environment(folder: Path) -> None:
    (folder / "env.json").write_text("[1]")


@pytest.mark.parametrize(
    "damage", [no_toml, no_text, no_database, no_summary, no_lines, no_environment], ids=lambda f: f.__name__
)
def test_a_damaged_run_does_not_hide_the_others(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        make(tmp_path / name)
    damage(tmp_path / "b")
    assert main(["runs", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [str(tmp_path / name) for name in "abc"]
    assert "accuracy 0.250 [0.200, 0.310]" in rows[0]
    assert "accuracy 0.250 [0.200, 0.310]" in rows[2]
    assert any(name in rows[1] for name in ("config.toml", "run.db", "summary.json", "metrics.jsonl", "env.json"))
    assert rows[1].count(str(tmp_path)) == 1
    assert main(["runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(row) == {"folder", "error"} for row in found] == [False, True, False]


def test_a_folder_that_cannot_be_read_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(str(tmp_path / "a"))
    assert out[1] == f"{tmp_path / 'closed'}  cannot be read: Permission denied"


def test_one_run_says_what_its_numbers_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    assert main(["runs", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"the last line of its metrics.jsonl, written {time.strftime('%Y-%m-%d')} ")
    assert {line.split()[0] for line in lines[2:]} >= {"step"}
    assert "time" not in {line.split()[0] for line in lines[2:]}
    make(tmp_path / "b", steps=0)
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    assert main(["runs", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no step is done yet"]


def test_a_narrow_terminal_shows_the_whole_name_and_the_main_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / NAME)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(runs.sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["runs", str(tmp_path)]) == 0
    name, rest = capsys.readouterr().out.splitlines()
    assert name == str(tmp_path / NAME)
    assert len(rest) <= 80
    assert rest.split()[0] == time.strftime("%Y-%m-%d")
    assert "sft  2 steps  accuracy 0.250 [0.200, 0.310]  unfinished" in rest
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert main(["runs", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("verb", ["grpo", "classify", "pretrain"])
def test_a_run_is_resumed_by_its_own_verb(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "my run")
    assert main([verb, "--resume", "--output-dir", str(tmp_path / "my run")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f"is a run of sft, not of {verb}" in said
    assert said.endswith(f"continue it with: upslope sft --resume --output-dir '{tmp_path / 'my run'}'")
