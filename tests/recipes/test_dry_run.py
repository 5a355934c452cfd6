"""--dry-run: what it predicts is near what then happens, and it shows what the model will see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUMS = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"
RUNS = {
    "sft": ("sft", "--task", SUMS, "--max-steps", "3", "--num-examples", "64", "--eval-samples", "0"),
    "ppo": (
        *("ppo", "--task", SUMS, "--max-steps", "2", "--num-prompts", "8", "--num-train-prompts", "64"),
        *("--max-completion-length", "16", "--eval-samples", "0", "--eval-every", "0"),
    ),
}


def upslope(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        [sys.executable, "-m", "upslope", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("verb", RUNS)
def test_prediction_on_the_bundled_model(verb: str, smollm2_folder: Path, tmp_path: Path) -> None:
    """Peak memory within 25%, time per step within a factor of 2."""
    arguments = (*RUNS[verb], "--model", str(smollm2_folder), "--json")
    said = upslope(*arguments, "--dry-run", folder=tmp_path)
    assert said.returncode == 0, said.stderr
    predicted: dict[str, Any] = json.loads(said.stdout)["prediction"]
    done = upslope(*arguments, "--output-dir", "run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert predicted["memory_gb"] == pytest.approx(summary["peak_memory_gb"], rel=0.25)
    lines = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"eval/' not in line
    ]
    if verb == "ppo":
        step = min(line["seconds/rollout"] + line["seconds/update"] for line in lines)
        assert 0.5 < predicted["step_seconds"] / step < 2
    else:
        step = summary["seconds"] / summary["steps"]
        assert 0.4 < predicted["step_seconds"] / step < 2


@pytest.mark.parametrize("verb", RUNS)
def test_dry_run_shows_the_example_and_writes_nothing(verb: str, tiny: Path, tmp_path: Path) -> None:
    done = upslope(*RUNS[verb], "--model", str(tiny), "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "arithmetic" in done.stdout.replace("·", "")
    assert "Predicted:" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_explain_says_it_in_words(tmp_path: Path) -> None:
    done = upslope("explain", "--verb", "grpo", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["sequences_per_step"] == 128
    assert any("no reference model" in line for line in plan["words"])
