"""A held-out figure of a part of the rows says so before the run, and counts them in the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from upslope.cli import main
from upslope.loop.kept import tell_task
from upslope.tasks.base import load_task


def rows(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(count)))
    return str(path)


def test_a_task_tells_where_it_can_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = load_task("pairs", eval_path=rows(tmp_path / "e.jsonl", 9))
    for measured in (0, 9):
        tell_task(task, measured)
    assert capsys.readouterr().err == ""
    tell_task(task, 4)
    assert capsys.readouterr().err == "4 of 9 held-out problems of task 'pairs' are measured (eval_samples)\n"
    (tmp_path / "e.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 3)
    tell_task(load_task("pairs", eval_path=str(tmp_path / "e.jsonl")), 1)
    assert capsys.readouterr().err == f"{tmp_path / 'e.jsonl'}: 2 of 3 rows repeat a pair and are left out\n"
    tell_task(load_task("strict_json"), 4)
    assert capsys.readouterr().err == ""


def test_sft_counts_the_rows_of_its_held_out_loss(tiny: Path, tmp_path: Path, capsys) -> None:
    data, held_out = rows(tmp_path / "d.jsonl", 20), rows(tmp_path / "e.jsonl", 9)
    arguments = ["sft", "--model", str(tiny), "--data", data, "--eval-data", held_out, "--eval-samples", "4"]
    assert main([*arguments, "--max-steps", "1", "--batch-size", "2", "--output-dir", str(tmp_path / "run")]) == 0
    assert f"kept 4 of 9 rows of {held_out}: 5 beyond eval_samples\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"]["eval_rows"] == 4
