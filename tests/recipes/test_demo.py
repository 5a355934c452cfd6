"""The demo on a tiny model: three stages, one summary in the promised form, nothing hard-coded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from upslope.cli import main
from upslope.errors import RunError
from upslope.options import DemoOptions
from upslope.studies.demo import demo

SUMS = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2,instruction="


def test_summary_of_the_demo(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    arguments = ["--model", str(tiny), "--task", SUMS, "--eval-samples", "20", "--sft-steps", "2", "--ppo-steps", "2"]
    assert main(["demo", *arguments, "--output-dir", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((folder / "summary.json").read_text())
    assert printed == summary
    assert set(summary["accuracy"]) == {"base", "sft", "ppo"}
    for stage in summary["accuracy"].values():
        assert {"value", "low", "high", "n"} <= set(stage)
        assert stage["low"] <= stage["value"] <= stage["high"]
        assert stage["n"] == 20
    assert summary["seconds"] > 0
    assert summary["peak_memory_gb"] > 0
    assert summary["ppo"]["max_logprob_diff"] == 0.0
    for stage in ("sft", "ppo"):
        assert (folder / stage / "checkpoints/last/model/model.safetensors").is_file()
        assert len(summary["samples"][stage]) == 6


def test_no_held_out_problem_is_trained_on() -> None:
    from upslope.tasks.base import load_task

    task = load_task(DemoOptions().task)
    held_out = {p.key for p in task.prompts("eval", DemoOptions().eval_samples, seed=0)}
    assert len(held_out) >= 500
    trained = {p.key for p in task.prompts("train", 2000, seed=0)}
    assert not held_out & trained


def test_the_demo_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        demo(DemoOptions(output_dir=str(tmp_path)))
    assert (tmp_path / "something").read_text() == "mine"


def test_runs_lists_and_shows(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tiny), "--task", SUMS, "--eval-samples", "10", "--max-steps", "1", "--num-prompts", "2"]
    more = ["--num-train-prompts", "20", "--max-completion-length", "3"]
    assert main(["ppo", *arguments, *more, "--output-dir", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main(["runs", "--folder", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["verb"], row["steps"]) == ("ppo", 1)
    assert main(["runs", "--folder", str(tmp_path / "one")]) == 0
    assert "rollout/max_logprob_diff" in capsys.readouterr().out
    assert main(["runs", "--folder", str(tmp_path / "absent")]) == 5
    assert main(["runs", "--folder", str(tmp_path)]) == 0
    assert "ppo" in capsys.readouterr().out
