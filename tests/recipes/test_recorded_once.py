"""What a run records: its start too, every step and evaluation once, whatever is resumed and wherever it was killed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from supervised_kit import bert, pairs_file, table_file, tiny

from upslope.loop import session
from upslope.options import ClassifyOptions, PPOOptions, SFTOptions
from upslope.options.common import RunOptions
from upslope.recipes.classify import Classify, classify
from upslope.recipes.ppo import PPO, ppo
from upslope.recipes.sft import SFT, sft
from upslope.runs.folder import Run
from upslope.training.stopping import Evaluation

SHARED: dict[str, Any] = {"dtype": "float32", "learning_rate": 1e-2, "max_steps": 3, "eval_every": 2, "save_every": 1}
SAMPLED: dict[str, Any] = {"num_train_prompts": 6, "num_prompts": 2, "num_generations": 2, "max_completion_length": 3}

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts


class Letters(Task):
    name = "letters"
    inline_safe = True

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [len(set(text)) / 3 for text in completions]
"""


def ppo_options(folder: Path, **changes: Any) -> PPOOptions:
    task = folder / "letters.py"
    task.write_text(TASK)
    return PPOOptions(**SHARED | SAMPLED | {"model": tiny(), "task": f"{task}:Letters", "eval_samples": 4} | changes)


def sft_options(folder: Path, **changes: Any) -> SFTOptions:
    data = pairs_file(folder / "rows.jsonl")
    return SFTOptions(**SHARED | {"model": tiny(), "data": data, "eval_data": data, "batch_size": 2} | changes)


def classify_options(folder: Path, **changes: Any) -> ClassifyOptions:
    data = table_file(folder / "rows.csv")
    shared = SHARED | {"model": bert(), "data": data, "eval_data": data, "batch_size": 2, "max_length": 32}
    return ClassifyOptions(**shared | changes)


VERBS: dict[str, tuple[Callable[..., RunOptions], Callable[..., dict[str, Any]], type]] = {
    "ppo": (ppo_options, ppo, PPO),
    "sft": (sft_options, sft, SFT),
    "classify": (classify_options, classify, Classify),
}


def recorded(folder: Path) -> dict[str, Any]:
    """How often everything is there, and the values of the evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with Run.open(folder, read_only=True) as run:
        return {
            "rollouts": Counter((r.step, r.split) for r in run.store.rollouts(limit=-1)),
            "evaluations": [e[:7] for e in run.store.evaluations("held-out")],
            "spent": Counter((e.step, e.metric) for e in run.store.evaluations("spent")),
            "lines": [(line["step"], any(name.startswith("eval/") for name in line)) for line in lines],
            "best": (folder / "checkpoints/best").resolve().name,
        }


@pytest.mark.parametrize("verb", VERBS)
def test_a_finished_run_is_resumed_as_often_as_one_likes(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, train, learner = VERBS[verb]
    first = train(options(tmp_path, output_dir=str(tmp_path / "run")))
    found = recorded(tmp_path / "run")
    assert found["lines"] == [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
    if verb == "ppo":
        assert {key: n for key, n in found["rollouts"].items() if key[1] == "eval"} == dict.fromkeys(
            [(0, "eval"), (2, "eval"), (3, "eval")], 4
        )
    state = (tmp_path / "run/checkpoints/last/state.json").read_bytes()
    monkeypatch.setattr(learner, "evaluate", lambda self, step: pytest.fail("evaluated again"))
    for steps in (3, 3, 2):
        capsys.readouterr()
        again = train(options(tmp_path, output_dir=str(tmp_path / "run"), resume=True, max_steps=steps))
        assert recorded(tmp_path / "run") == found
        assert (tmp_path / "run/checkpoints/last/state.json").read_bytes() == state
        assert again["evaluation"] == first["evaluation"]
        said = capsys.readouterr().err
        assert f"{verb}: nothing is left to do: max_steps: 3 " in said
        assert "150%" not in said
    assert "3 steps done, and 2 are asked for" in said


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", ["held-out", "spent", "save"])
def test_a_run_killed_around_its_last_evaluation_has_it_once(
    place: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 3 is there, the evaluation of step 3 in part: killed after the one, before the other."""
    options, train, _ = VERBS[verb]
    train(options(tmp_path, output_dir=str(tmp_path / "whole")))
    calls: Counter[str] = Counter()
    record, save = Run.record_evaluation, session.checkpoint.save

    def recording(self: Run, step: int, name: str, metrics: Mapping[str, Any], **given: Any) -> None:
        if step == 3 and name == place:
            raise KeyboardInterrupt
        record(self, step, name, metrics, **given)

    def saving(folder: Path, step: int, **given: Any) -> Path:
        calls["saved"] += step == 3
        if place == "save" and calls["saved"] == 2:
            raise KeyboardInterrupt
        return save(folder, step, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record_evaluation", recording)
        patch.setattr(session.checkpoint, "save", saving)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path, output_dir=str(tmp_path / "run")))
    for _ in range(2):
        train(options(tmp_path, output_dir=str(tmp_path / "run"), resume=True))
        assert recorded(tmp_path / "run") == recorded(tmp_path / "whole")


@pytest.mark.parametrize("verb", VERBS)
def test_the_start_is_measured_and_training_does_not_notice(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an evaluation draws from the global generators: weights, moments and random states are the same bits."""
    options, train, learner = VERBS[verb]
    evaluate = learner.evaluate

    def drawing(self: Any, step: int) -> Any:
        random.random(), np.random.random(), torch.rand(1)
        return evaluate(self, step)

    monkeypatch.setattr(learner, "evaluate", drawing)
    train(options(tmp_path, output_dir=str(tmp_path / "with"), eval_every=1))
    train(options(tmp_path, output_dir=str(tmp_path / "without"), eval_every=0))
    tensors = [
        {
            f"{path.relative_to(last)} {name}": x
            for path in last.rglob("*.safetensors")
            for name, x in load_file(path).items()
        }
        for last in ((tmp_path / name / "checkpoints/last").resolve() for name in ("with", "without"))
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())
    assert [step for step, held_out in recorded(tmp_path / "with")["lines"] if held_out] == [0, 1, 2, 3]
    assert [step for step, held_out in recorded(tmp_path / "without")["lines"] if held_out] == [3]
    assert recorded(tmp_path / "with")["best"] != "step-00000000"


def test_without_held_out_problems_nothing_is_measured(tmp_path: Path) -> None:
    assert ppo(ppo_options(tmp_path, output_dir=str(tmp_path / "run"), eval_samples=0))["evaluation"] is None
    assert recorded(tmp_path / "run")["lines"] == [(1, False), (2, False), (3, False)]


def test_a_line_of_an_evaluation_has_the_interval(tmp_path: Path) -> None:
    summary = ppo(ppo_options(tmp_path, output_dir=str(tmp_path / "run")))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    found = summary["evaluation"]["reward"]
    assert found["low"] <= found["value"] <= found["high"]
    assert found["n"] == line["eval/reward/n"] == 4
    assert [line["eval/reward"], line["eval/reward/low"]] == [found["value"], found["low"]]


@pytest.mark.parametrize("verb", ["sft", "classify"])
def test_of_equally_good_checkpoints_the_one_with_the_lower_loss_is_the_best(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, train, learner = VERBS[verb]
    losses = {0: 0.1, 1: 0.9, 2: 0.3, 3: 0.4}
    monkeypatch.setattr(learner, "evaluate", lambda self, step: Evaluation("accuracy", {"accuracy": 0.5}, losses[step]))
    train(options(tmp_path, output_dir=str(tmp_path / "run"), eval_every=1, patience=2))
    assert recorded(tmp_path / "run")["best"] == "step-00000002"
