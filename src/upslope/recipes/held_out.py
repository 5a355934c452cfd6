"""Held-out problems and tokens of which a run measures a part (eval_samples): it says of how many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.evaluation.measurement import Measurement, ratio
from upslope.tasks.base import Task
from upslope.types import Batch

__all__ = ["per_token", "tell_part", "tell_task"]


def per_token(values_N: Tensor, batches: Sequence[Batch]) -> dict[str, Any]:
    """The mean of a number per trained token of the batches, with its interval over their sequences."""
    counts = [count for batch in batches for count in torch.bincount(batch.sequence_N).tolist()]
    sums = [float(part.sum()) for part in values_N.double().split(counts)]
    return Measurement("mean", np.asarray([sums, counts], dtype=np.float64).T, ratio).interval()


def tell_part(measured: int, size: int | None, what: str) -> None:
    """A line on standard error where what is measured is a part. size: of the whole, None where nobody knows."""
    if size is not None and 0 < measured < size:
        print(f"{measured:,} of {size:,} {what} are measured (eval_samples)", file=sys.stderr)


def tell_task(task: Task, measured: int) -> None:
    """`tell_part` of a task's held-out problems, and the task's own remarks."""
    for line in task.remarks():
        print(line, file=sys.stderr)
    tell_part(measured, task.size("eval"), f"held-out problems of task '{task.name}'")
