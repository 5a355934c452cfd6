"""The sums of benchmarks/sums_task.py as a task of upslope: `benchmarks/sums.py:Sums`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import sums_task
from upslope.tasks.base import Task, select_prompts
from upslope.types import Message, Prompt, Reward


class Sums(Task):
    """kind "exact": the right number; "digits": the share of digits in the reply."""

    name = "sums"
    inline_safe = True

    def __init__(self, kind: str = "exact") -> None:
        self.judge = {"exact": sums_task.reward, "digits": sums_task.digit_share}[kind]

    def prompts(self, split: str, n: int, *, seed: int) -> list[Prompt]:
        """Different sums; which of them are held out depends on their content."""
        found = (Prompt(0, text=text, answer=sums_task.answer(text)) for text in sums_task.prompts())
        return select_prompts(found, split, n, name=self.name)

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[Reward]:
        """The shared reward; correct where it is 1."""
        values = [self.judge(p.text or "", text) for p, text in zip(prompts, completions, strict=True)]
        return [Reward(value=value, correct=value == 1.0) for value in values]

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The sum."""
        return (Message("user", prompt.text or ""), Message("assistant", prompt.answer or ""))
