"""The rows of an encoder's splits with what was left out of them, before they are tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from upslope.recipes.kept import BEYOND, DataAccount, Split

__all__ = ["Rows", "account_of"]


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


def account_of(splits: Mapping[str, Rows], further: Mapping[str, Any]) -> DataAccount:
    """What becomes of the rows of every split, and further facts about them."""
    kept = {n: Split(r.source, len(r.rows), r.dropped, r.notes, r.lent) for n, r in splits.items()}
    return DataAccount(kept, further)
