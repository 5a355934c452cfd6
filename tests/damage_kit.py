"""Runs with checkpoints of every kind of model, to be damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from encoder_kit import encoder_folder
from tiny_model import tiny_folder

from upslope.cli import main

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Message, Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt(f"Say {i}", answer="a") for i in range(500)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(float("a" in text), correct="a" in text) for text in completions]

    def demonstration(self, prompt):
        return (*prompt.messages, Message("assistant", "aaaa"))
"""


def inputs(folder: Path) -> None:
    """A task and rows of every kind."""
    (folder / "letter.py").write_text(TASK)
    rows = [{"prompt": f"Say {i}", "completion": "aaa"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"Say {i}", "chosen": "aaa", "rejected": "b"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    texts = [("the film was good", "up"), ("the film was bad", "down")] * 8
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in texts))
    (folder / "text.txt").write_text("aaa bbb\n" * 40)


def make_runs(folder: Path) -> None:
    """The runs `full`, `lora`, `reward` and `label`, of one or two steps each, in a folder that has `inputs`."""
    tiny_folder(folder / "start")
    encoder_folder(folder / "bert")
    common = ["--max-steps", "2", "--batch-size", "4", "--dtype", "float32", "--eval-every", "0"]
    sft = ["sft", "--data", "rows.jsonl", "--model", "start", *common]
    assert main([*sft, "--output-dir", "full"]) == 0
    assert main([*sft, "--output-dir", "lora", "--lora-rank", "2"]) == 0
    assert main(["reward", "--data", "pairs.jsonl", "--model", "start", *common, "--output-dir", "reward"]) == 0
    labelled = ["--data", "labels.csv", "--eval-data", "labels.csv", "--model", "bert", "--num-epochs", "1"]
    assert main(["classify", *labelled, "--max-length", "32", "--output-dir", "label"]) == 0


def flip(path: Path, at: float = 0.5) -> None:
    """Change one bit of the byte that stands at this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def copied(work: Path, name: str, target: Path) -> Path:
    """A copy of a run, which may be damaged."""
    shutil.copytree(work / name, target, symlinks=True)
    return target


def refusal(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("upslope: error:")]
    assert len(lines) == 1
    return lines[0]


def in_folder(folder: Path) -> pytest.MonkeyPatch:
    """Work in a folder until `undo`."""
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    return patch
