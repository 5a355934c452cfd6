"""Held-out problems and tokens of which a run measures a part (eval_samples): it says of how many."""

from __future__ import annotations

import sys

from upslope.tasks.base import Task

__all__ = ["tell_part", "tell_task"]


def tell_part(measured: int, size: int | None, what: str) -> None:
    """A line on standard error where what is measured is a part. size: of the whole, None where nobody knows."""
    if size is not None and 0 < measured < size:
        print(f"{measured:,} of {size:,} {what} are measured (eval_samples)", file=sys.stderr)


def tell_task(task: Task, measured: int) -> None:
    """`tell_part` of a task's held-out problems, and the task's own remarks."""
    for line in task.remarks():
        print(line, file=sys.stderr)
    tell_part(measured, task.size("eval"), f"held-out problems of task '{task.name}'")
