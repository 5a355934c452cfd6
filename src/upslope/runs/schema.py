"""The tables of run.db, the records read back from them, and how a connection is opened."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from upslope.atomic import open_own, refuse_other_than_file, saving
from upslope.errors import RunError
from upslope.runs.encoding import Kind

SCHEMA_VERSION = 1

# Token arrays lie in a table of their own, so that listing and filtering rollouts never reads their pages.
TABLES = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS metrics (
    name TEXT NOT NULL, step INTEGER NOT NULL, value REAL, time REAL NOT NULL,
    PRIMARY KEY (name, step)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS metrics_step ON metrics (step);
CREATE TABLE IF NOT EXISTS rollouts (
    id INTEGER PRIMARY KEY, step INTEGER NOT NULL, split TEXT NOT NULL, prompt_key, sample INTEGER NOT NULL,
    version INTEGER NOT NULL, prompt TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT, completion TEXT NOT NULL,
    reward REAL, parts TEXT NOT NULL, correct INTEGER, error TEXT, process_rewards TEXT NOT NULL,
    reward_seconds REAL NOT NULL, finish_reason TEXT NOT NULL, advantage REAL, length INTEGER NOT NULL,
    time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS rollouts_step ON rollouts (step);
CREATE INDEX IF NOT EXISTS rollouts_prompt ON rollouts (prompt_key);
CREATE TABLE IF NOT EXISTS token_arrays (
    rollout INTEGER NOT NULL REFERENCES rollouts (id) ON DELETE CASCADE, name TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (rollout, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS evaluations (
    name TEXT NOT NULL, metric TEXT NOT NULL, step INTEGER NOT NULL, value REAL, low REAL, high REAL, n INTEGER,
    details TEXT NOT NULL, time REAL NOT NULL, PRIMARY KEY (name, metric, step)) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}');
"""

INTEGER_ARRAYS: dict[str, Kind] = {"prompt_tokens": "i", "tokens": "i", "mask": "B"}


def array_kind(name: str) -> Kind:
    """int32 for token ids, one byte for the mask, float32 for everything else."""
    return INTEGER_ARRAYS.get(name, "f")


class MetricPoint(NamedTuple):
    """One value of a metric; NaN where NaN was logged. `time` is in seconds since 1970."""

    step: int
    value: float
    time: float


class Evaluation(NamedTuple):
    """One evaluated number with its interval and sample size, where it has them."""

    step: int
    name: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    details: dict[str, Any]
    time: float


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One rollout without its token arrays. `length` counts the tokens after the prompt, `time` is since 1970.

    `reward` is None where judging failed (`error` says why); `advantage` is a scalar: the sequence's, or the mean over
    its sampled tokens.
    """

    id: int
    step: int
    split: str
    prompt_key: int
    sample: int
    version: int
    prompt: str
    messages: list[dict[str, Any]]
    answer: str | None
    completion: str
    reward: float | None
    parts: dict[str, Any]
    correct: bool | None
    error: str | None
    process_rewards: list[tuple[int, float]]
    reward_seconds: float
    finish_reason: str
    advantage: float | None
    length: int
    time: float


@dataclass(frozen=True, slots=True)
class StoredRollout:
    """One rollout in full: `arrays` holds prompt_tokens, and per token after the prompt: tokens, mask (0 or 1),
    sampling_logprobs, policy_logprobs and whatever the trainer added (ref_logprobs, values, advantages, returns, ...).
    NaN marks tokens that were observed, not sampled.
    """

    row: RolloutRow
    arrays: dict[str, list[Any]]


@contextmanager
def database_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an error of SQLite into one line that names the file and the remedy."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        text = str(error)
        if "full" in text:
            remedy = "the disk is full; free some space, then continue with --resume"
        elif "I/O" in text:  # a quota, or no space for SQLite's shared memory
            remedy = f"{text}: is the disk full or a quota used up? free some space, then continue with --resume"
        elif "locked" in text or "busy" in text:
            remedy = "another process holds it; stop that process and try again"
        elif "readonly" in text or "unable to open" in text:
            remedy = f"{text}; check the folder and its permissions"
        elif "not a database" in text or "malformed" in text:
            remedy = f"{text}; the file is damaged: move it away or restore it"
        else:
            remedy = text
        raise RunError(f"{path}: cannot {action}: {remedy}") from error


@contextmanager
def row_errors(path: Path) -> Iterator[None]:
    """Turns what a row that this program did not write does to its reader into one line that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: a row cannot be read ({error}); the file is damaged: restore it") from error


def connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    """An open connection whose schema this program understands.

    Raises:
        RunError: missing, damaged, newer than this program, locked, or on a full disk.
    """
    with database_errors(path, "open"):
        connection = _open_reader(path) if read_only else _open_writer(path)
    try:
        with database_errors(path, "read"):
            _check_version(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_writer(path: Path) -> sqlite3.Connection:
    # SQLite would follow a link; the files that it puts beside this one have this one's permissions.
    refuse_other_than_file(path)
    if not path.exists():
        with saving(path):
            os.close(open_own(path, os.O_RDWR))
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(TABLES)
    except BaseException:
        connection.close()
        raise
    return connection


def _open_reader(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise RunError(f"{path}: no such file; is this a run folder?")
    address = path.resolve().as_uri()
    # A WAL database on read-only media can be read only if nothing waits in its log: then it is immutable.
    log = path.with_name(path.name + "-wal")
    modes = ["mode=ro"] if log.exists() and log.stat().st_size else ["mode=ro", "mode=ro&immutable=1"]
    for mode in modes:
        connection = sqlite3.connect(f"{address}?{mode}", uri=True, timeout=30.0, check_same_thread=False)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master")
            return connection
        except sqlite3.OperationalError:
            connection.close()
            if mode == modes[-1]:
                raise
        except BaseException:
            connection.close()
            raise
    raise AssertionError("unreachable")


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    version = row[0] if row else 0
    if str(version) != str(SCHEMA_VERSION):
        raise RunError(
            f"{path}: schema version {version!s:.40}, this program reads {SCHEMA_VERSION}; "
            "use the version of upslope named in the run's env.json"
        )
