"""The last lines of a run: what came out, and commands that work as they are printed."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from supervised_kit import OPINIONS, REVERSED, bert, conll_file, jsonl, pairs_file, table_file, texts_file, tiny
from test_session import Walk, go

from upslope import options as all_options
from upslope.cli import VERBS, main, parse
from upslope.runs.folder import Run

SMALL = ["--max-steps", "2", "--eval-every", "1", "--dtype", "float32"]


def commands_in(said: str) -> dict[str, str]:
    """The printed commands by what they are for."""
    lines = [line.strip().split(maxsplit=1) for line in said.splitlines() if "  upslope " in line]
    return {name: command for name, command in lines}


def assert_understood(command: str) -> None:
    """The command line parses, with the options that it names."""
    program, verb, *words = shlex.split(command)
    assert program == "upslope"
    if VERBS[verb].words and words and not words[0].startswith("-"):
        words = [f"--{VERBS[verb].words}", *words]
    parse(verb, getattr(all_options, VERBS[verb].options), words).validate()


NETWORK = ("--hidden-size", "16", "--num-layers", "1", "--tokenizer", "char")
SAMPLED = ("--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "3", "--num-train-prompts", "4")


def arguments(verb: str, folder: Path) -> list[str]:
    """A short run of the verb; its files lie in the folder."""
    rows = pairs_file(folder / "my rows.jsonl")
    if verb == "grpo":
        return [verb, *SMALL, "--model", tiny(), *SAMPLED, "--eval-samples", "3"]
    data: dict[str, tuple[str, str]] = {
        "sft": (rows, rows),
        "pretrain": (texts_file(folder / "a.jsonl"), texts_file(folder / "b.jsonl")),
        "dpo": (preferences(folder),) * 2,
        "reward": (preferences(folder),) * 2,
        "classify": (table_file(folder / "t.csv"),) * 2,
        "tag": (conll_file(folder / "t.conll"),) * 2,
        "seq2seq": (pairs_file(folder / "p.jsonl", REVERSED), rows),
    }
    further: dict[str, tuple[str, ...]] = {
        "pretrain": (*NETWORK, "--cache-dir", str(folder / "cache")),
        "seq2seq": (*NETWORK, "--num-heads", "2"),
        "classify": ("--model", bert(), "--max-length", "32"),
        "tag": ("--model", bert(), "--max-length", "32"),
    }
    train, held_out = data[verb]
    own = further.get(verb, ("--model", tiny()))
    return [verb, *SMALL, "--data", train, "--eval-data", held_out, *own]


def preferences(folder: Path) -> str:
    rows = [{"prompt": f"Say {i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    return jsonl(folder / "pairs.jsonl", rows)


WANTED = {
    "sft": ("chat", "evaluate", "serve", "continue"),
    "pretrain": ("chat", "evaluate", "serve", "continue"),
    "grpo": ("chat", "evaluate", "serve", "continue"),
    "dpo": ("chat", "serve", "continue"),
    "reward": ("evaluate", "use", "continue"),
    "classify": ("evaluate", "continue"),
    "tag": ("evaluate", "continue"),
    "seq2seq": ("chat", "evaluate", "serve", "continue"),
}


@pytest.mark.parametrize("verb", WANTED)
def test_a_run_ends_with_what_came_out_and_commands_that_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my run"
    assert main([*arguments(verb, tmp_path), "--output-dir", str(folder)]) == 0
    said = capsys.readouterr().err
    closing = said.splitlines()[-8:]
    opening = next(line for line in said.splitlines() if "learning rate" in line)
    assert opening.startswith("upslope: trains on ")
    assert " parameters, in float32; learning rate " in opening
    assert " held out; " in opening
    summary = json.loads((folder / "summary.json").read_text())
    found = commands_in(said)
    assert found == summary["commands"]
    assert tuple(found) == WANTED[verb]
    assert any(line.startswith(f"{verb}: max_steps: 2 of 2 steps done; in {folder}; best") for line in closing)
    assert sum(line.startswith("held-out ") for line in closing) == (2 if verb == "grpo" else 1)
    assert summary["best"]["evaluation"][summary["measure"]] is not None
    assert summary["start"].keys() == summary["evaluation"].keys()
    for command in found.values():
        assert_understood(command)
    if verb == "grpo":
        assert shlex.split(found["evaluate"])[-2:] == ["--max-completion-length", "3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    further = {"evaluate": ["--limit", "2"], "chat": ["--max-tokens", "4"], "use": [*SMALL, *SAMPLED, "--json"]}
    for name in ("evaluate", "chat", "use", "continue"):
        if name in found:
            extra = further.get(name, [])
            extra += ["--output-dir", str(tmp_path / "used")] if name == "use" else []
            assert main([*shlex.split(found[name])[1:], *extra]) == 0, name
    with Run.open(folder, read_only=True) as run:
        assert run.metric_lines()[-1]["step"] == 4


def test_where_eval_cannot_say_it_there_is_no_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward that is not the task's own, and rows that were held out of the training file."""
    own = [*arguments("grpo", tmp_path), "--reward", "length:target=2", "--output-dir", str(tmp_path / "a")]
    assert main(own) == 0
    said = capsys.readouterr().err
    assert "evaluate" not in commands_in(said)
    rewards = [line for line in said.splitlines() if line.startswith("held-out reward: ")]
    assert len(rewards) == 1
    assert rewards[0].count("n=3 at ") >= 2


def without_a_file(verb: str, folder: Path) -> list[str]:
    """The arguments of a run that holds rows of its training file out, named by columns of their own in sft."""
    words = arguments(verb, folder)
    at = words.index("--eval-data")
    words = words[:at] + words[at + 2 :]
    if verb == "sft":
        rows = [{"asked": f"say {i}", "answer": "a"} for i in range(12)]
        words[words.index("--data") + 1] = jsonl(folder / "own.jsonl", rows)
        words += ["--columns", "prompt=asked", "completion=answer", "--max-completion-length", "5"]
    return words


@pytest.mark.parametrize("verb", ["sft", "classify", "tag", "reward"])
def test_where_no_file_was_held_out_the_command_leaves_its_place_open(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = without_a_file(verb, tmp_path)
    if verb == "classify":
        words[words.index("--data") + 1] = table_file(tmp_path / "more.csv", [*OPINIONS, ("nothing", "none")])
    assert main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    command = shlex.split(commands_in(capsys.readouterr().err)["evaluate"])
    assert command.count("FILE") == 1
    if verb == "sft":
        assert command[-5:] == ["--columns", "prompt=asked", "completion=answer", "--max-completion-length", "5"]
    filled = [words[words.index("--data") + 1] if word == "FILE" else word for word in command[1:]]
    assert main([*filled, "--limit", "2"]) == 0


@pytest.mark.parametrize(
    ("limits", "further"),
    [
        ({"max_tokens": 20}, ["--max-tokens", "40"]),
        ({"patience": 1}, ["--patience", "2"]),
        ({"target": 0.5}, []),
        ({"max_steps": 3}, ["--max-steps", "6"]),
    ],
)
def test_the_limit_that_ended_it_is_raised(limits: dict[str, Any], further: list[str], tmp_path: Path) -> None:
    summary = go(tmp_path / "run", Walk([0.5, 0.4, 0.3, 0.2]), **limits)
    words = shlex.split(summary["commands"]["continue"])
    assert words == ["upslope", "sft", "--resume", "--output-dir", str(tmp_path / "run"), *further]


def test_a_second_ctrl_c_says_where_the_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Walk):
        def step(self, step: int) -> Any:
            if step == self.dies_at:
                raise KeyboardInterrupt
            return super().step(step)

    for dies_at, kept in ((0, "no checkpoint was saved yet"), (3, "the last checkpoint is of step 2")):
        folder = tmp_path / str(dies_at)
        with pytest.raises(KeyboardInterrupt):
            go(folder, Stopped([0.0] * 9, dies_at=dies_at), eval_every=0, save_every=2)
        said = capsys.readouterr().err
        assert f"sft: stopped at once; {kept}; go on from there: upslope sft --resume --output-dir {folder}\n" in said


def test_it_is_said_what_is_trained_and_that_nothing_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", *SMALL, "--model", tiny(), "--data", pairs_file(tmp_path / "five.jsonl"), "--lora-rank", "2"]
    assert main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    opening = next(line for line in said.splitlines() if line.startswith("upslope: trains on 5, "))
    assert "none held out (nothing is measured)" in opening
    found = re.findall(r"([\d,]+) of its ([\d,]+) parameters", opening)[0]
    trained, whole = (int(number.replace(",", "")) for number in found)
    assert 0 < trained < whole / 2
    assert said.count("sft: 2/2 steps") == 1
