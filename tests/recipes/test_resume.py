"""A run that is killed and resumed ends with the same bits as one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from upslope.cli import main
from upslope.devices.hardware import choose_dtype
from upslope.runs.folder import Run

KILLS = 22


def comparable(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that must not depend on when it was stopped."""
    last = (folder / "checkpoints/last").resolve()
    tensors = {
        f"{path.relative_to(last)}:{name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    state = json.loads((last / "state.json").read_text())
    state["stop"].pop("seconds")
    state.pop("clock")
    timed = ("time", "seconds/", "tokens_per_second")
    metrics = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    with Run.open(folder, read_only=True) as run:
        rows = run.store.rollouts(limit=-1)
        rollouts = [(r.step, r.split, r.prompt_key, r.sample, r.completion, r.reward, r.advantage) for r in rows]
        arrays = [run.store.rollout(r.id).arrays for r in rows]
    return {
        "tensors": tensors,
        "state": state,
        "metrics": [line for line in metrics if not any(name.startswith("eval/") for name in line)],
        "evaluations": [line for line in metrics if any(name.startswith("eval/") for name in line)],
        "rollouts": rollouts,
        "arrays": [{k: list(map(repr, v)) for k, v in a.items()} for a in arrays],
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(bits(found["tensors"][name]), bits(tensor)), name
    for part in ("state", "metrics", "rollouts", "arrays"):
        assert found[part] == expected[part], part


@pytest.mark.slow
def test_killed_runs_end_like_the_run_that_was_never_stopped(tiny: Path, tmp_path: Path) -> None:
    task = tmp_path / "letter.py"
    from test_recipes import TASK

    task.write_text(TASK)
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny), f"{task}:Letter", str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(report["kills"].values()) >= KILLS
    assert min(report["kills"].values()) >= KILLS // 3
    expected = comparable(tmp_path / "reference")
    assert len(expected["metrics"]) == 6
    assert any("critic" in name for name in expected["tensors"])
    assert expected["state"]["learner"]["kl"] is not None
    for i in range(report["runs"]):
        found = comparable(tmp_path / f"run-{i}")
        assert_same(found, expected)
        assert [line["step"] for line in found["evaluations"]] == [0, 3, 6]
        assert found["evaluations"] == expected["evaluations"]


def arguments(tiny: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("ppo", "--model", str(tiny), "--output-dir", str(folder), "--reward", "length:target=3"),
        *("--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "4", "--eval-samples", "2"),
        *("--num-train-prompts", "20", "--max-steps", "4", "--lr-scheduler-type", "constant", *more),
    ]


def test_resume_takes_the_configuration_of_the_run(tiny: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(arguments(tiny, whole)) == 0
    assert main(arguments(tiny, parts, "--max-steps", "2")) == 0
    assert main(["ppo", "--resume", "--output-dir", str(parts), "--max-steps", "4"]) == 0
    found, expected = comparable(parts), comparable(whole)
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    assert found["metrics"] == expected["metrics"]


def test_a_run_resumed_at_its_end_stays_what_it_is(tiny: Path, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and the summary."""
    folder = tmp_path / "run"
    assert main(arguments(tiny, folder)) == 0
    before = comparable(folder)
    (folder / "summary.json").unlink()
    assert main(["ppo", "--resume", "--output-dir", str(folder)]) == 0
    assert_same(comparable(folder), before)


@pytest.mark.parametrize("change", [("--learning-rate", "0.5"), ("--seed", "3"), ("--num-generations", "3")])
def test_resume_refuses_what_would_be_another_run(
    change: tuple[str, str], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny, tmp_path / "run", "--max-steps", "1")) == 0
    capsys.readouterr()
    assert main(["ppo", "--resume", "--output-dir", str(tmp_path / "run"), *change]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert change[0].lstrip("-").replace("-", "_") in said[0]


def steps_of(metrics: Path) -> int:
    return metrics.read_text().count('"learning_rate"')


def test_ctrl_c_saves_and_ends_with_130(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "upslope", *arguments(tiny, folder, "--max-steps", "100000")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and steps_of(metrics) >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT" in errors
    assert "without saving" in errors
    assert f"interrupted after step {steps_of(metrics)}, which is saved; in {folder}" in errors
    assert f"upslope ppo --resume --output-dir {folder}\n" in errors
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    assert (folder / "checkpoints/last/model/model.safetensors").is_file()
    steps = steps_of(metrics)
    assert summary["steps"] == steps
    assert main(["ppo", "--resume", "--output-dir", str(folder), "--max-steps", str(steps + 1)]) == 0


def test_auto_is_in_a_resumed_run_what_it_was_in_its_first_launch(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(arguments(tiny, folder, "--max-steps", "1")) == 0
    environment = json.loads((folder / "env.json").read_text())
    here = environment["dtype"]
    elsewhere = {"float32": "bfloat16", "bfloat16": "float32"}[here]
    assert here == str(choose_dtype("auto")[0]).removeprefix("torch.")
    (folder / "env.json").write_text(json.dumps({**environment, "dtype": elsewhere}))
    again = ["ppo", "--resume", "--output-dir", str(folder), "--max-steps", "2"]
    for _ in range(2):
        capsys.readouterr()
        assert main(again) == 2
        error = capsys.readouterr().err
        assert f"the run computes in {elsewhere}, and here auto is {here}" in error
        assert f"--dtype {elsewhere}" in error
    assert main([*again, "--dtype", here]) == 2
    assert "--resume cannot change dtype" in capsys.readouterr().err
    assert main([*again, "--dtype", elsewhere]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 2
