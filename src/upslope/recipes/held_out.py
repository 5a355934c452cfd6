"""Held-out rows of which a run measures a part (eval_samples): it says of how many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar

from upslope.tasks.base import Task

__all__ = ["first_of", "tell_part", "tell_task"]

Row = TypeVar("Row")


def first_of(rows: Sequence[Row], limit: int | None, source: object) -> list[Row]:
    """The first `limit` rows (None: all); a line on standard error where these are a part."""
    chosen = list(rows[:limit])
    tell_part(len(chosen), len(rows), f"held-out rows of {source}")
    return chosen


def tell_part(measured: int, size: int | None, what: str) -> None:
    """A line on standard error where what is measured is a part. size: of the whole, None where nobody knows."""
    if size is not None and 0 < measured < size:
        print(f"{measured:,} of {size:,} {what} are measured (eval_samples)", file=sys.stderr)


def tell_task(task: Task, measured: int) -> None:
    """`tell_part` of a task's held-out problems."""
    tell_part(measured, task.size("eval"), f"held-out problems of task '{task.name}'")
