"""run.db: metrics, rollouts and evaluations of one run, written by its trainer, read by any number of viewers."""

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from upslope.runs.encoding import as_number, rollout_records
from upslope.runs.schema import (
    RENAMED,
    UNDECLARED,
    MetricPoint,
    RolloutRow,
    StoredEvaluation,
    StoredRollout,
    connect,
    database_errors,
    is_older,
    row_errors,
    transaction,
)
from upslope.types import RolloutGroup

_COLUMNS = tuple(field.name for field in fields(RolloutRow))


class Store:
    """One connection; may be used from several threads.

    Raises (every method):
        RunError: full disk, locked or damaged database.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        # A run that is not continued after all stays as it is, for the program that wrote it.
        self._untouched = not read_only and self.path.is_file() and is_older(self.path)
        self._connection, self._columns = connect(self.path, read_only=read_only or self._untouched)

    # Writing

    def set_meta(self, key: str, value: str) -> None:
        """Remembers one fact about the run."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add_metrics(self, step: int, metrics: Mapping[str, int | float], *, wall_time: float | None = None) -> None:
        """Stores the step's values; a name logged twice at a step keeps the last value."""
        now = time.time() if wall_time is None else wall_time
        rows = [(name, step, float(value), now) for name, value in metrics.items()]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)

    def add_rollouts(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        *,
        split: str = "train",
        arrays: Mapping[str, Sequence[Any]] | None = None,
        advantages: Sequence[float | None] | None = None,
    ) -> None:
        """Stores every rollout of `groups`; an evaluation repeated at a step takes the place of the one before.

        Args:
            step: the update they are used in.
            groups: judged rollouts, in (prompt, sample) order.
            split: "train", or the name of an evaluation.
            arrays: column -> one array per rollout (B = number of rollouts, in the order of `groups`): values per token
                after the prompt, or per sampled token (spread by the mask, NaN elsewhere); None where there is none.
            advantages: one scalar per rollout; default: the mean of arrays["advantages"] over the sampled tokens.

        Raises:
            ValueError: an array that is no column (see `schema.MIGRATIONS`), one that fits neither length, or not one
                entry per rollout.
        """
        if undeclared := sorted(set(arrays or ()) - set(self._columns)):
            raise ValueError(f"array {undeclared[0]!r} is no column of run.db; those are {', '.join(self._columns)}")
        records = rollout_records(step, groups, split, arrays or {}, advantages, time.time())
        names = ", ".join(_COLUMNS[1:])
        marks = ", ".join("?" * (len(_COLUMNS) - 1))
        with self._transaction() as connection:
            if split != "train":
                connection.execute("DELETE FROM rollouts WHERE step = ? AND split = ?", (step, split))
            for values, own in records:
                rollout = connection.execute(f"INSERT INTO rollouts ({names}) VALUES ({marks})", values).lastrowid
                rows = [(rollout, name, self._columns[name][0](array)) for name, array in own.items()]
                connection.executemany("INSERT INTO token_arrays VALUES (?, ?, ?)", rows)

    def add_evaluation(self, step: int, name: str, metrics: Mapping[str, float | Mapping[str, Any]]) -> None:
        """Stores an evaluation: metric -> number, or {"value", "low", "high", "n", further details}."""
        rows = []
        for metric, given in metrics.items():
            entry = dict(given) if isinstance(given, Mapping) else {"value": given}
            found = [entry.pop(key, None) for key in ("value", "low", "high", "n")]
            numbers = [None if x is None else as_number(x, metric) for x in found]
            rows.append((name, metric, step, *numbers, json.dumps(entry), time.time()))
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Drops everything recorded at a step greater than `step`, and unless `evaluated` its own evaluation."""
        with self._transaction() as connection:
            for table in ("metrics", "rollouts", "evaluations"):
                connection.execute(f"DELETE FROM {table} WHERE step > ?", (step,))
            if not evaluated:
                connection.execute("DELETE FROM rollouts WHERE step = ? AND split != 'train'", (step,))
                connection.execute("DELETE FROM evaluations WHERE step = ?", (step,))

    def flush(self) -> None:
        """Makes what was written survive a power cut (a kill it survives anyway)."""
        with self._lock, database_errors(self.path, "write"):
            if not self._untouched:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """May be called twice."""
        with self._lock, database_errors(self.path, "close"):
            self._connection.close()

    # Reading

    def meta(self, key: str) -> str | None:
        """What `set_meta` stored."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", [key])
        return rows[0][0] if rows else None

    def metric_names(self) -> list[str]:
        """The names of all metrics, sorted."""
        return [row[0] for row in self._rows("SELECT DISTINCT name FROM metrics ORDER BY name")]

    def metric_series(self, name: str, *, after: int = -1) -> list[MetricPoint]:
        """The values of one metric at steps greater than `after`, by step."""
        query = "SELECT step, value, time FROM metrics WHERE name = ? AND step > ? ORDER BY step"
        return [MetricPoint(step, _nan(value), at) for step, value, at in self._rows(query, [name, after])]

    def last_step(self) -> int | None:
        """The greatest step with a metric, or None."""
        return self._rows("SELECT max(step) FROM metrics")[0][0]

    def metric_steps(self) -> set[int]:
        """The steps with a metric."""
        return {row[0] for row in self._rows("SELECT DISTINCT step FROM metrics")}

    def rollout_steps(self, split: str = "train") -> list[tuple[int, int]]:
        """(step, number of rollouts) for each step that has any."""
        query = "SELECT step, count(*) FROM rollouts WHERE split = ? GROUP BY step ORDER BY step"
        return [(step, count) for step, count in self._rows(query, [split])]

    def rollouts(self, *, limit: int = 100, **filters: Any) -> list[RolloutRow]:
        """Rollouts without their arrays, in the order in which they were stored; `limit` -1 means all.

        Filters, by equality: step, split, prompt_key, sample.
        """
        if unknown := filters.keys() - {"step", "split", "prompt_key", "sample"}:
            raise ValueError(f"unknown filter {min(unknown)!r}")
        # SQLite has no larger integers: keys beyond them are stored as text
        values = [x if isinstance(x, str) or -(2**63) <= x < 2**63 else str(x) for x in filters.values()]
        where = " AND ".join(["TRUE", *(f"{name} = ?" for name in filters)])
        query = f"SELECT {', '.join(_COLUMNS)} FROM rollouts WHERE {where} ORDER BY id LIMIT ?"
        with row_errors(self.path):
            return [_row(row) for row in self._rows(query, [*values, limit])]

    def rollout(self, rollout_id: int) -> StoredRollout:
        """One rollout with all its arrays.

        Raises:
            KeyError: there is none with this id.
        """
        rows = self._rows(f"SELECT {', '.join(_COLUMNS)} FROM rollouts WHERE id = ?", [rollout_id])
        if not rows:
            raise KeyError(f"{self.path}: no rollout {rollout_id}")
        blobs = self._rows("SELECT name, data FROM token_arrays WHERE rollout = ? ORDER BY name", [rollout_id])
        with row_errors(self.path):
            named = [(RENAMED.get(name, name), blob) for name, blob in blobs]
            read = {name: self._columns.get(name, UNDECLARED)[1](blob) for name, blob in named}
            return StoredRollout(_row(rows[0]), read)

    def evaluations(self, name: str | None = None) -> list[StoredEvaluation]:
        """All evaluated numbers, or those of one evaluation, by step."""
        where, values = ("WHERE name = ?", [name]) if name is not None else ("", [])
        query = f"SELECT step, name, metric, value, low, high, n, details, time FROM evaluations {where}"
        rows = self._rows(query + " ORDER BY step, name, metric", values)
        with row_errors(self.path):
            return [
                StoredEvaluation._make([*row[:3], _nan(row[3]), *row[4:7], json.loads(row[7]), row[8]]) for row in rows
            ]

    # Plumbing

    def _rows(self, query: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock, database_errors(self.path, "read"):
            return self._connection.execute(query, tuple(values)).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._untouched:
                self._connection.close()
                self._connection, self._columns = connect(self.path, read_only=False)
                self._untouched = False
            with database_errors(self.path, "write"), transaction(self._connection):
                yield self._connection


def _row(row: Sequence[Any]) -> RolloutRow:
    named = dict(zip(_COLUMNS, row, strict=True))
    steps = [(int(at), float(value)) for at, value in json.loads(named["process_rewards"])]
    return RolloutRow(
        **named
        | {name: json.loads(named[name]) for name in ("messages", "parts")}
        | {"prompt_key": int(named["prompt_key"]), "process_rewards": steps}
        | {"correct": None if named["correct"] is None else bool(named["correct"])}
    )


def _nan(value: float | None) -> float:
    # SQLite stores NaN as NULL; metrics have no other NULLs.
    return math.nan if value is None else value
