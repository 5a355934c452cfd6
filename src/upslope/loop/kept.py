"""What became of every row of a recipe's data: how many are used, how many were left out and why.

A recipe's Learner carries a `DataAccount`; the training loop says it at the start and writes it into summary.json, and
`--dry-run` shows the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from upslope.build import Policy
from upslope.data.pieces import PairTokenizer
from upslope.data.records import Record
from upslope.errors import DataError
from upslope.evaluation.measurement import Measurement, ratio
from upslope.tasks.base import Task
from upslope.types import Batch

TOO_LONG = "longer than max_length"
BEYOND = "beyond eval_samples"

Row = TypeVar("Row")
Options = TypeVar("Options", bound=Any)


@dataclass(frozen=True, slots=True)
class Kept(Generic[Row]):
    """The rows of a source that can be used, and how many of the others there are by reason.

    `notes` adds to a reason what a reader wants to know. Raises DataError where nothing is left.
    """

    source: str
    rows: list[Row]
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError(f"{self.source}: none of its {sum(self.dropped.values()):,} rows is left: {self.reasons}")

    @property
    def reasons(self) -> str:
        """Counts and reasons in words."""
        return _in_words(self.dropped, self.notes)

    @property
    def split(self) -> Split:
        """All of it in use for one purpose."""
        return Split(self.source, len(self.rows), self.dropped, self.notes)


@dataclass(frozen=True, slots=True)
class Split:
    """Rows of a source in use for one purpose, and what was left out; `lent`: rows of it in use for the other one."""

    source: str
    rows: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    lent: int = 0

    def __str__(self) -> str:
        used = self.rows + self.lent
        total = used + sum(self.dropped.values())
        return f"kept {used:,} of {total:,} rows of {self.source}: {_in_words(self.dropped, self.notes)}"


@dataclass(frozen=True, slots=True)
class DataAccount:
    """The account of a run, by split (train, eval, ...); `further` facts go into the same place of summary.json."""

    splits: Mapping[str, Split] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """{"rows": {split: number in use}, "dropped": {split: {reason: number}}, and what is further}."""
        rows = {name: split.rows for name, split in self.splits.items()}
        dropped = {name: dict(split.dropped) for name, split in self.splits.items()}
        return {"rows": rows, "dropped": dropped, **self.further} if self.splits else dict(self.further)

    def and_held_out(self, held: Kept[Any] | None) -> DataAccount:
        """With the problems of a task that are measured."""
        return self if held is None else replace(self, splits={**self.splits, "eval": held.split})

    @property
    def held_out(self) -> str:
        """How many rows are measured, in words."""
        rows = sum(split.rows for name, split in self.splits.items() if name in ("eval", "dev"))
        return f"{rows:,} held out" if rows else "none held out (nothing is measured)"

    def lines(self) -> list[str]:
        """A line for every split that lost rows."""
        return [str(split) for split in self.splits.values() if split.dropped]


NO_DATA = DataAccount()
"""Of a recipe that asks tasks and reads no rows."""


def shared_out(
    data: Kept[Row], held_out: Kept[Row] | None, *, held: int, samples: int | None
) -> tuple[list[Row], list[Row], DataAccount]:
    """(training rows, rows to measure on, account): without a source of their own the last `held` rows are held out.

    At most `samples` rows are measured on (None: all).
    """
    if held_out is None:
        cut = len(data.rows) - held
        train, found, source, lost = data.rows[:cut], data.rows[cut:], f"{data.source}, held out", {}
        notes: Mapping[str, str] = {}
    else:
        train, found, source, lost = data.rows, held_out.rows, held_out.source, dict(held_out.dropped)
        notes, held = held_out.notes, 0
    measured = found[:samples]
    if len(found) > len(measured):
        lost = {**lost, BEYOND: len(found) - len(measured)}
    splits = {
        "train": Split(data.source, len(train), data.dropped, data.notes, lent=held),
        "eval": Split(source, len(measured), lost, notes),
    }
    return train, measured, DataAccount(splits)


class _Context(int):
    """A max_length that is the model's context."""

    def __str__(self) -> str:
        return f"{self:,} (the model's context)"


def within_context(options: Options, policy: Policy) -> Options:
    """The options with max_length within the model's context: a row beyond that is left out and counted, too."""
    most = policy.model.spec.max_positions
    if isinstance(policy.tokenizer, PairTokenizer) or options.max_length <= most:  # of a pair, each side has a context
        return options
    return replace(options, max_length=_Context(most))


def too_long(lengths: Sequence[int], max_length: int) -> tuple[dict[str, int], dict[str, str]]:
    """(dropped, notes) of rows of these numbers of tokens, which are over the limit."""
    if not lengths:
        return {}, {}
    reason = "longer than the model's context" if isinstance(max_length, _Context) else TOO_LONG
    return {reason: len(lengths)}, {reason: f"{max_length:,}; the longest has {max(lengths):,} tokens"}


def _in_words(dropped: Mapping[str, int], notes: Mapping[str, str]) -> str:
    noted = {reason: f" ({note})" for reason, note in notes.items()}
    return ", ".join(f"{count:,} {reason}{noted.get(reason, '')}" for reason, count in dropped.items()) or "it has none"


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
