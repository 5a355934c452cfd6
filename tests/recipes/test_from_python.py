"""Recipes called from Python: options are checked as the command checks them; tasks and rewards may be objects."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_folder

import upslope
from upslope.build import load_policy, make_optimizer
from upslope.cli import main, parse
from upslope.config import check, load
from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.options import GRPOOptions, PPOOptions, SFTOptions
from upslope.recipes import CLASSES
from upslope.recipes.grpo import grpo
from upslope.recipes.sft import sft
from upslope.tasks.base import load_task
from upslope.workers.rewards import make_scorer

PROGRAM = """
from upslope.tasks.base import Task, chat_prompt, select_prompts


class Letter(Task):
    def __init__(self, letter="a"):
        self.letter = letter

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [text.count(self.letter) / 4 for text in completions]


def short(prompts, completions):
    return [-len(text) / 10 for text in completions]
"""


@pytest.fixture
def program(tmp_path: Path) -> ModuleType:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["program"] = module
    spec.loader.exec_module(module)
    return module


def options(tiny: Path, folder: Path, **changes: Any) -> GRPOOptions:
    common: dict[str, Any] = {"model": str(tiny), "output_dir": str(folder), "num_train_prompts": 8, "num_prompts": 2}
    common |= {"num_generations": 2, "max_completion_length": 6, "max_steps": 2, "eval_samples": 2, "eval_every": 0}
    return GRPOOptions(**{**common, "learning_rate": 3e-3, "dtype": "float32", **changes})


def weights(summary: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(summary["model"]) / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("verb", CLASSES)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"),
        ({"learning_rate": "much"}, "learning_rate must be a number, got 'much'"),
        ({"max_steps": 2.5}, "max_steps must be an integer, got 2.5"),
        ({"output_dir": 7}, "output_dir must be a string or none, got 7"),
    ],
)
def test_options_made_in_python_are_checked_before_anything_is_loaded(
    verb: str, wrong: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = getattr(importlib.import_module(f"upslope.recipes.{verb}"), verb)
    needed = {"pretrain": {"data": ("a.txt",)}, "distill": {"teacher": "t", "task": "chain_sum"}}
    rows = {} if issubclass(CLASSES[verb], upslope.options.RLOptions) else {"data": "a.jsonl"}
    with pytest.raises(ConfigError, match=said):
        recipe(CLASSES[verb](**{**needed.get(verb, rows), "model": "/no/model", **wrong}))
    assert not list(tmp_path.iterdir())


def test_paths_in_python_are_looked_for_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: no such file"):
        sft(SFTOptions(model="/no/model", data=tmp_path / "rows.jsonl"))
    with pytest.raises(RunError, match="not a run folder"):
        sft(SFTOptions(model="/no/model", data="x/y", resume=True, output_dir=str(tmp_path)))


def test_a_task_and_a_function_are_what_their_names_are(tiny: Path, program: ModuleType, tmp_path: Path) -> None:
    """The same bits as by name; the file says that it cannot repeat the run; the same objects resume it."""
    file = tmp_path / "program.py"
    named = grpo(
        options(tiny, tmp_path / "named", task=f"{file}:Letter:letter=b", reward=("task", f"{file}:short@0.5"))
    )
    given: dict[str, Any] = {"task": program.Letter("b"), "reward": ["task", (program.short, 0.5)]}
    half = grpo(options(tiny, tmp_path / "given", max_steps=1, lr_scheduler_type="constant", **given))
    assert half["steps"] == 1
    whole = grpo(options(tiny, tmp_path / "whole", **given))
    assert same(weights(named), weights(whole))
    constant = grpo(options(tiny, tmp_path / "constant", lr_scheduler_type="constant", **given))
    again = options(tiny, tmp_path / "given", lr_scheduler_type="constant", resume=True, **given)
    assert same(weights(grpo(again)), weights(constant))

    config = tmp_path / "given" / "config.toml"
    written = tomllib.loads(config.read_text())
    assert written["task"] == "python:program:Letter"
    assert written["reward"] == ["task", "python:program:short@0.5"]
    assert "# An object of the Python program: this file alone cannot repeat the run.\ntask" in config.read_text()
    with pytest.raises(ConfigError, match=r"config.toml:\d+: task = python:program:Letter is an object of the Python"):
        load(GRPOOptions, config)
    with pytest.raises(ConfigError, match=r"--resume cannot change task \('python:program:Letter' -> 'chain_sum"):
        grpo(options(tiny, tmp_path / "given", lr_scheduler_type="constant", resume=True, reward=given["reward"]))
    file.write_text(PROGRAM + "\n# changed\n")
    with pytest.raises(RunError, match=r"program.py \(--reward\), .*program.py \(--task\) have changed since"):
        grpo(options(tiny, tmp_path / "given", lr_scheduler_type="constant", resume=True, **given))


def test_objects_are_judged_with_in_this_process(program: ModuleType) -> None:
    with make_scorer(program.Letter(), [program.short]) as scorer:
        assert type(scorer).__name__ == "InlineJudge"
    with pytest.raises(ConfigError, match=r"short .* is an object of this process, where a reward worker has none"):
        make_scorer("chain_sum", [program.short], processes=2)
    with pytest.raises(ConfigError, match="must take \\(prompts, completions\\)"):
        make_scorer("chain_sum", [lambda texts: texts])
    task = program.Letter()
    assert load_task(task) is task
    assert task.name == "Letter"


def test_a_run_repeats_from_its_config_after_a_resume(
    tiny: Path, program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`upslope VERB --config runs/x/config.toml`, as documented and as the model card has it, into a new folder."""
    monkeypatch.chdir(tmp_path)
    base = f"grpo --task {tmp_path / 'program.py'}:Letter --model {tiny} --num-train-prompts 8 --num-prompts 2"
    base += " --num-generations 2 --max-completion-length 6 --eval-samples 0 --dtype float32 --learning-rate 0.003"
    base += " --lr-scheduler-type constant"
    assert main([*base.split(), "--max-steps", "1", "--output-dir", "x", "--json"]) == 0
    assert main(["grpo", "--resume", "--output-dir", "x", "--max-steps", "2", "--json"]) == 0
    written = tomllib.loads(Path("x/config.toml").read_text())
    assert (written["resume"], written["json"], written["output_dir"]) == (False, False, "none")
    assert main(["grpo", "--config", "x/config.toml"]) == 0
    (made,) = Path("runs").iterdir()
    last = "checkpoints/last/model/model.safetensors"
    assert same(load_file(Path("x") / last), load_file(made / last))

    old = (
        Path("x/config.toml")
        .read_text()
        .replace('output_dir = "none"\nresume = false', 'output_dir = "x"\nresume = true')
    )
    assert 'output_dir = "x"\nresume = true' in old
    Path("x/config.toml").write_text(old)
    read = parse("grpo", GRPOOptions, ["--config", "x/config.toml"])
    assert (read.resume, read.output_dir) == (False, None)
    Path("mine.toml").write_text(old)
    assert parse("grpo", GRPOOptions, ["--config", "mine.toml"]).resume


def test_what_is_wrong_with_options_made_in_python_is_said_truly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"also a single one in brackets, as in \[f\]"):
        check(GRPOOptions(reward=lambda prompts, completions: [0.0]))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="give a model folder"):
        load_policy(PPOOptions(model="/no-such-folder"))
    good = PPOOptions(model=str(tiny_folder(tmp_path / "m")), dtype="float32")
    with pytest.raises(ConfigError, match="learning_rate"):
        make_optimizer(load_policy(good), replace(good, learning_rate=-1.0), [])
