"""--dry-run of what samples: task and rewards are loaded and asked as the run will do it, and fail as it would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upslope.cli import main

TASK = """
from dataclasses import replace
from upslope.tasks import Task, chat_prompt
from upslope.types import Reward
EXIST = {"train": 150, "eval": 20}
class Few(Task):
    name = "few"
    def __init__(self, *, long: int = -1):
        self.long = long
    def prompts(self, split, n, *, seed):
        if n > EXIST[split]:
            from upslope.errors import DataError
            raise DataError(f"few: {EXIST[split]} {split} prompts exist where {n} were asked for")
        long = self.long if split == "train" else self.long - 1000
        return [replace(chat_prompt("x" * (600 if i == long else 5) + f" {split} {i}"), key=i) for i in range(n)]
    def rewards(self, prompts, completions):
        return [Reward(value=0.25, parts={"form": 0.25}, correct=False) for _ in prompts]
"""
REWARDS = """
def good(prompts, completions):
    return [{"one": 1.0, "two": float(len(prompts))} for _ in completions]
def raises(prompts, completions):
    raise KeyError("no such thing")
def sometimes(prompts, completions):
    if len(completions) > 1:
        raise ValueError("one by one, please")
    sometimes.calls = getattr(sometimes, "calls", 0) + 1
    return [None if sometimes.calls == 2 else 0.5]
def hangs(prompts, completions):
    import time
    time.sleep(60)
"""
VERBS = ("ppo", "grpo", "reinforce", "expert")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "broken.py").write_text("import json\nimport no_such_module\ndef fine(p, c): return [1.0]\n")
    return tmp_path


def dry(verb: str, tiny: Path, files: Path, *arguments: str, long: int = -1) -> int:
    common = ("--model", str(tiny), "--output-dir", str(files / "run"), "--max-completion-length", "3", "--dry-run")
    sizes = ("--num-prompts", "2", "--num-generations", "2", "--num-train-prompts", "150", "--eval-samples", "20")
    task = f"{files / 'task.py'}:Few:long={long}"
    code = main([verb, "--task", task, *common, *sizes, *arguments])
    assert not (files / "run").exists()
    return code


@pytest.mark.parametrize("verb", VERBS)
def test_the_task_is_asked_and_a_real_completion_is_judged(verb: str, tiny: Path, files: Path, capsys) -> None:
    reward = ("--reward", f"{files / 'rewards.py'}:good@0.5", "--reward", "length:target=4@2", "--reward", "task")
    assert dry(verb, tiny, files, *reward, "--json") == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (said["train_prompts"], said["held_out"]) == (150, 20)
    judged = said["judged"]
    parts = judged["parts"]
    assert (judged["judged"], judged["errors"]) == (2, 0)
    assert list(parts) == ["good/one", "good/two", "length", "form"]
    assert (parts["good/one"], parts["good/two"], parts["form"]) == (1.0, 2.0, 0.25)
    assert judged["reward"] == pytest.approx(0.5 * 3.0 + 2 * parts["length"] + 0.25)
    assert dry(verb, tiny, files) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "- 150 problems to train on and 20 held out; the longest: " in shown
    assert "0.25 (form 0.25); 2 judged in " in shown


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--reward", "{files}/broken.py:fine"), 2, "broken.py:2: ModuleNotFoundError: No module named"),
        (("--reward", "lenght:target=4"), 2, "no reward is called 'lenght'; did you mean 'length'?"),
        (("--reward", "lenght:target=4", "--reward-workers", "1"), 2, "no reward is called 'lenght'"),
        (("--num-train-prompts", "151"), 3, "few: 150 train prompts exist where 151 were asked for"),
        (("--eval-samples", "21"), 3, "few: 20 eval prompts exist where 21 were asked for"),
        (("--reward", "{files}/rewards.py:raises"), 3, "no reward could be computed for any of 2 completions"),
    ],
)
def test_what_the_run_would_stop_at_stops_the_dry_run(
    verb: str, arguments: tuple[str, ...], code: int, message: str, tiny: Path, files: Path, capsys
) -> None:
    assert dry(verb, tiny, files, *(x.replace("{files}", str(files)) for x in arguments)) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("upslope: error: ")
    assert message in error


def test_a_prompt_that_does_not_fit_is_counted_wherever_it_stands(tiny: Path, files: Path, capsys) -> None:
    assert dry("grpo", tiny, files, long=140) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kept 149 of 150 rows of task few: 1 too long for the context" in shown
    assert "149 problems to train on and 20 held out" in shown
    assert dry("grpo", tiny, files, long=1007) == 0
    assert "kept 19 of 20 rows of task few, held out: 1 too long" in " ".join(capsys.readouterr().out.split())
    assert dry("grpo", tiny, files, "--max-completion-length", "5000") == 2
    assert "--max-completion-length 5000 leaves no room for a prompt" in capsys.readouterr().err


def test_time_limit_and_errors_are_those_of_the_run(tiny: Path, files: Path, capsys) -> None:
    assert dry("grpo", tiny, files, "--reward", f"{files / 'rewards.py'}:sometimes") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 judged in " in shown
    assert "1 of them could not be judged: " in shown
    assert dry("grpo", tiny, files, "--reward", f"{files / 'rewards.py'}:hangs", "--reward-timeout", "0.2") == 3
    assert "after 0.2 s" in capsys.readouterr().err


def test_supervised_runs_answer_two_held_out_problems(tiny: Path, files: Path, capsys) -> None:
    (files / "mute.py").write_text(TASK.replace("correct=False", "correct=None") + DEMONSTRATION)
    (files / "said.py").write_text(TASK + DEMONSTRATION)
    common = ("--model", str(tiny), "--max-completion-length", "3", "--dry-run", "--json")
    sft = ("sft", *common, "--num-examples", "20", "--batch-size", "2")
    assert main([*sft, "--task", f"{files / 'said.py'}:Few", "--eval-samples", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out"] == 20
    distill = ("distill", *common, "--teacher", str(tiny), "--num-train-prompts", "20", "--num-prompts", "2")
    for verb in (sft, distill):
        assert main([*verb, "--task", f"{files / 'said.py'}:Few", "--eval-samples", "21"]) == 3
        assert "few: 20 eval prompts exist where 21" in capsys.readouterr().err
        assert main([*verb, "--task", f"{files / 'mute.py'}:Few", "--eval-samples", "20"]) == 3
        assert "the rewards carry no verdicts" in capsys.readouterr().err


DEMONSTRATION = """
    def demonstration(self, prompt):
        from upslope.types import Message
        return (*prompt.messages, Message("assistant", "yes"))
"""
