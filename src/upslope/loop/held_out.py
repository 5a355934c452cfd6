"""What a run says of its data at the start: that it measures a part (eval_samples), that texts stay plain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.data.records import Record
from upslope.evaluation.measurement import Measurement, ratio
from upslope.tasks.base import Task
from upslope.types import Batch

__all__ = ["per_token", "tell_part", "tell_plain", "tell_task"]


def per_token(values_N: Tensor, batches: Sequence[Batch]) -> dict[str, Any]:
    """The mean of a number per trained token of the batches, with its interval over their sequences."""
    counts = [count for batch in batches for count in torch.bincount(batch.sequence_N).tolist()]
    sums = [float(part.sum()) for part in values_N.double().split(counts)]
    return Measurement("mean", np.asarray([sums, counts], dtype=np.float64).T, ratio).interval()


def tell_part(measured: int, size: int | None, what: str) -> None:
    """A line on standard error where what is measured is a part. size: of the whole, None where nobody knows."""
    if size is not None and 0 < measured < size:
        print(f"{measured:,} of {size:,} {what} are measured (eval_samples)", file=sys.stderr)


def tell_plain(records: Sequence[Record], tokenizer: Any, source: str) -> None:
    """A line on standard error where prompts are texts, which a chat template does not reach, and there is one."""
    if getattr(tokenizer, "chat_template", None) and any(isinstance(record.prompt, str) for record in records):
        print(f"{source}: read as plain text, without the chat template; give messages for a chat", file=sys.stderr)


def tell_task(task: Task, measured: int) -> None:
    """`tell_part` of a task's held-out problems, and the task's own remarks."""
    for line in task.remarks():
        print(line, file=sys.stderr)
    tell_part(measured, task.size("eval"), f"held-out problems of task '{task.name}'")
