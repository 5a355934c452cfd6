"""--dry-run: what it predicts is near what then happens, and it shows what the model will see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from upslope.config import check
from upslope.options import ExpertOptions, GRPOOptions, PPOOptions, PretrainOptions, RLOptions, Seq2SeqOptions
from upslope.preview.dry_run import little
from upslope.preview.plan import plan_of
from upslope.preview.probe import _Watch

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


@pytest.mark.parametrize(
    "options",
    [
        PPOOptions(num_epochs=3, num_minibatches=4, rollout_lag=2, value_pretraining_steps=5, truncated="bootstrap"),
        GRPOOptions(dynamic_sampling=True, truncated="mask", num_iterations=2, max_steps=1),
        ExpertOptions(num_rounds=3, keep="top", threshold=0.5),
        ExpertOptions(from_run="run", mix_data="rows.jsonl", mix_ratio=0.5),
        PretrainOptions(data=("texts/",), context_length=256, num_epochs=3.0),
        Seq2SeqOptions(data="pairs.jsonl", objective="minimum_risk"),
        Seq2SeqOptions(data="pairs.jsonl", num_epochs=2.0),
    ],
)
def test_the_little_run_is_one_the_recipe_takes(options: Any) -> None:
    """Same data and models, a small first step of one update, and nothing that a few unlucky samples could end."""
    small = little(options)
    check(small)
    plan = plan_of(small, examples=1000)
    assert plan.sequences_per_step <= 40
    assert (plan.optimizer_steps_per_step, plan.optimizer_steps) == (1, 2)
    for name in ("data", "model", "task", "num_train_prompts", "eval_samples", "max_completion_length", "lora_rank"):
        assert getattr(small, name, None) == getattr(options, name, None)
    if isinstance(options, RLOptions):
        assert small.truncated != "mask"
        assert bool(small.rollout_lag) == bool(options.rollout_lag)


def test_a_step_is_told_apart_by_what_autograd_keeps() -> None:
    """Weights stay and are no activations; of two passes the larger counts; what lies between them is the update's."""
    weight = torch.nn.Parameter(torch.ones(8, 1000))
    watch = _Watch()
    with saved_tensors_hooks(watch.keep, watch.give):
        for rows in (5, 3):
            torch.randn(rows, 8).matmul(weight).exp().sum().backward()
    watch.update += watch.lap()
    assert watch.activation_bytes == 4 * 5 * (8 + 1000)
    assert min(watch.before, watch.passes, watch.update) > 0
