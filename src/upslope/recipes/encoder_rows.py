"""The rows of an encoder's splits with what was left out of them, before they are tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upslope.data.labels import read_rewards
from upslope.loop.kept import BEYOND, DataAccount, Split
from upslope.options.encoder import EncoderOptions

__all__ = ["Data", "Rows", "account_of", "rewards_of", "tell_counts"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a split in use, of which source, and what was left out; `lent`: rows of the source held out as dev."""

    source: str
    rows: list[Any]
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    lent: int = 0

    def first(self, rows: list[Any], most: int) -> Rows:
        """The first `most` of these same rows, put in another order."""
        beyond = {BEYOND: len(rows) - most} if len(rows) > most else {}
        return replace(self, rows=rows[:most], dropped={**self.dropped, **beyond})


@dataclass(frozen=True, slots=True)
class Data:
    """Encoded splits (of texts the inputs, of sentences the inputs of each), and what is to be said about them."""

    train: list[Any]
    dev: list[Any]
    test: list[Any]
    rewards: list[list[float]]
    account: DataAccount


def rewards_of(options: EncoderOptions, labels: Sequence[str]) -> list[list[float]]:
    """The rewards of the options' file, else 1 for the right label and 0 for another."""
    if options.rewards is not None:
        return read_rewards(options.rewards, labels)
    return [[float(i == j) for j in range(len(labels))] for i in range(len(labels))]


def tell_counts(counts: Mapping[str, Mapping[str, int]]) -> None:
    """A line on standard error for each thing that happened in some split: in how many rows of which."""
    for what, by_split in counts.items():
        if any(by_split.values()):
            said = ", ".join(f"{count} of {name}" for name, count in by_split.items() if count)
            print(f"upslope: {what}: {said}", file=sys.stderr)


def account_of(splits: Mapping[str, Rows], further: Mapping[str, Any]) -> DataAccount:
    """What becomes of the rows of every split, and further facts about them."""
    kept = {n: Split(r.source, len(r.rows), r.dropped, r.notes, r.lent) for n, r in splits.items()}
    return DataAccount(kept, further)
