"""The tables of run.db, the records read back from them, and how a connection is opened."""

import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from upslope.atomic import open_own, refuse_other_than_file, saving
from upslope.errors import RunError
from upslope.runs.encoding import ENCODINGS

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes], list[Any]]
_connect = partial(sqlite3.connect, timeout=30.0, isolation_level=None, check_same_thread=False)
_CHANGED = re.compile(r"\b(?:ALTER TABLE|UPDATE|INTO|DELETE FROM) (\w+)")

# Token arrays lie in a table of their own, so that listing and filtering rollouts never reads their pages.
_TABLES = """
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
"""
_TOKEN_COLUMNS = """
CREATE TABLE token_columns (name TEXT PRIMARY KEY, dtype TEXT NOT NULL, encoding TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO token_columns VALUES
    ('prompt_tokens', 'int32', 'little-endian'),
    ('tokens', 'int32', 'little-endian'),
    ('mask', 'uint8', 'little-endian'),
    ('sampling_logprobs', 'float32', 'little-endian'),
    ('policy_logprobs', 'float32', 'little-endian'),
    ('old_logprobs', 'float32', 'little-endian'),
    ('ref_logprobs', 'float32', 'little-endian'),
    ('values', 'float32', 'little-endian'),
    ('advantages', 'float32', 'little-endian'),
    ('returns', 'float32', 'little-endian'),
    ('divergence', 'float32', 'little-endian');
"""

MIGRATIONS = [_TABLES, _TOKEN_COLUMNS]
"""What leads from each schema version to the next, the first from an empty file: a released one is never changed.

Statements end with a semicolon, and none holds another. A new array per token is a migration that inserts its row into
token_columns, and nothing else. A file of an older version is brought up to date by the first thing written to it;
until then, and for viewers, what it lacks is in memory beside it.
"""


RENAMED = {"trainer_logprobs": "old_logprobs"}
"""What version 1 called an array that has another name since."""
UNDECLARED = ENCODINGS["little-endian", "float32"]
"""Of an array without a row in token_columns, which version 1 took under any name."""


class MetricPoint(NamedTuple):
    """One value of a metric; NaN where NaN was logged. `time` is in seconds since 1970."""

    step: int
    value: float
    time: float


class StoredEvaluation(NamedTuple):
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


_REMEDIES = {
    "full": "the disk is full; free some space, then continue with --resume",
    # a quota, or no space for SQLite's shared memory
    "I/O": "{}: is the disk full or a quota used up? free some space, then continue with --resume",
    "locked|busy": "another process holds it; stop that process and try again",
    "readonly|unable to open": "{}; check the folder and its permissions",
    "not a database|malformed": "{}; the file is damaged: move it away or restore it",
}
"""What an error of SQLite has in its text, and what to do about it."""


@contextmanager
def database_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an error of SQLite into one line that names the file and the remedy."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        remedy = next((said for words, said in _REMEDIES.items() if re.search(words, str(error))), "{}")
        raise RunError(f"{path}: cannot {action}: {remedy.format(error)}") from error


@contextmanager
def row_errors(path: Path) -> Iterator[None]:
    """Turns what a row that this program did not write does to its reader into one line that names the file."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: a row cannot be read ({error}); the file is damaged: restore it") from error


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block, or nothing of it where it raises or the process is killed."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def is_older(path: Path) -> bool:
    """Whether the file has the tables of an older version; not where it has none yet. RunError: damaged, newer."""
    with database_errors(path, "open"), closing(_connect(path)) as connection:
        return 0 < _version(connection, path, "main", least=0) < len(MIGRATIONS)


def connect(path: Path, *, read_only: bool) -> tuple[sqlite3.Connection, dict[str, tuple[Encode, Decode]]]:
    """An open connection in which all tables are this program's, whatever version the file has.

    Also every column of token arrays by name, with what makes its blobs and what reads them.

    Raises:
        RunError: missing, damaged, newer than this program, locked, or on a full disk.
    """
    with database_errors(path, "open"):
        connection = _open_reader(path) if read_only else _open_writer(path)
    columns = {}
    with _closed_on_failure(connection), database_errors(path, "read"):
        for name, dtype, encoding in connection.execute("SELECT name, dtype, encoding FROM token_columns"):
            if (encoding, dtype) not in ENCODINGS:
                raise RunError(
                    f"{path}: token_columns has {name!s:.40} as {dtype!s:.40}, {encoding!s:.40}, which this program "
                    "does not read; the file is damaged: restore it"
                )
            columns[name] = ENCODINGS[encoding, dtype]
    return connection, columns


def _open_writer(path: Path) -> sqlite3.Connection:
    # SQLite would follow a link; the files that it puts beside this one have this one's permissions.
    refuse_other_than_file(path)
    if not path.exists():
        with saving(path):
            os.close(open_own(path, os.O_RDWR))
    connection = _connect(path)
    with _closed_on_failure(connection):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        with transaction(connection):
            pending = MIGRATIONS[_version(connection, path, "main", least=0) :]
            _apply(connection, pending)
            if pending:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('schema_version', ?)", (str(len(MIGRATIONS)),))
    return connection


def _open_reader(path: Path) -> sqlite3.Connection:
    """The file beside an empty database in memory: a table that is not there is the file's."""
    if not path.is_file():
        raise RunError(f"{path}: no such file; is this a run folder?")
    address = path.resolve().as_uri()
    # A WAL database on read-only media can be read only if nothing waits in its log: then it is immutable.
    log = path.with_name(path.name + "-wal")
    modes = ["mode=ro"] if log.exists() and log.stat().st_size else ["mode=ro", "mode=ro&immutable=1"]
    for mode in modes:
        connection = _connect(":memory:", uri=True)
        try:
            with _closed_on_failure(connection):
                connection.execute("ATTACH ? AS stored", (f"{address}?{mode}",))
                _apply_beside(connection, MIGRATIONS[_version(connection, path, "stored", least=1) :])
                return connection
        except sqlite3.OperationalError:
            if mode == modes[-1]:
                raise
    raise AssertionError("unreachable")


def _version(connection: sqlite3.Connection, path: Path, schema: str, *, least: int) -> int:
    """The file's schema version, 0 where its making was cut off. RunError: not from `least` to this program's."""
    row = None
    if connection.execute(f"SELECT 1 FROM {schema}.sqlite_master WHERE name = 'meta'").fetchone():
        row = connection.execute(f"SELECT value FROM {schema}.meta WHERE key = 'schema_version'").fetchone()
    found = "0" if row is None else str(row[0])
    known = {str(version): version for version in range(least, len(MIGRATIONS) + 1)}
    if found not in known:
        raise RunError(
            f"{path}: schema version {found:.40}, this program reads 1 to {len(MIGRATIONS)}; "
            "use the version of upslope named in the run's env.json"
        )
    return known[found]


def _apply(connection: sqlite3.Connection, scripts: Sequence[str]) -> None:
    for script in scripts:
        for statement in script.split(";"):
            connection.execute(statement)


def _apply_beside(connection: sqlite3.Connection, scripts: Sequence[str]) -> None:
    """The migrations of a file that is only read: its tables that they change are copied into memory first."""
    for table in sorted(set(_CHANGED.findall("".join(scripts)))):
        query = "SELECT sql FROM stored.sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL ORDER BY type DESC"
        if made := connection.execute(query, (table,)).fetchall():
            _apply(connection, [sql for (sql,) in made])
            connection.execute(f"INSERT INTO main.{table} SELECT * FROM stored.{table}")
    _apply(connection, scripts)


@contextmanager
def _closed_on_failure(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise
