"""The stories of benchmarks/speed/work.py as a task of upslope: `benchmarks/speed/task.py:Stories`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.speed import work
from upslope.tasks.base import Task
from upslope.types import Prompt


class Stories(Task):
    """The prompts and the reward that the peers get."""

    name = "stories"
    inline_safe = True

    def prompts(self, split: str, n: int, *, seed: int) -> list[Prompt]:
        """The first n; only the train split is used."""
        return [Prompt(key, text=text) for key, text in enumerate(work.prompts(n))]

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """The shared reward."""
        return [work.reward(text) for text in completions]
