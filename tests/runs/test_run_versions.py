"""run.db of every version: shown, resumed exactly, or refused by name; a killed migration leaves the old or the new."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import struct
import sys
import textwrap
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import pytest

from upslope.cli import main
from upslope.errors import RunError
from upslope.runs import schema
from upslope.runs.folder import Run
from upslope.runs.store import Store
from upslope.types import Message, Prompt, Reward, Rollout, RolloutGroup

# As version 1 was written, from commit 82cd030 to 39a7a4f.
VERSION_1 = """
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
INSERT OR IGNORE INTO meta VALUES ('schema_version', '1');
"""
COMMITS = {"82cd030": {"verb": "ppo"}, "39a7a4f": {"verb": "ppo", "measure": "accuracy"}}
"""What each commit noted in `meta`: the later one also by what a run is judged."""
STEPS = 3
BLOBS = {
    "prompt_tokens": struct.pack("<2i", 1, 2),
    "tokens": struct.pack("<2i", 3, 4),
    "mask": b"\x01\x00",
    "sampling_logprobs": struct.pack("<2f", -1.0, math.nan),
    "policy_logprobs": struct.pack("<2f", -1.5, math.nan),
    "trainer_logprobs": struct.pack("<2f", -1.25, math.nan),
    "ref_logprobs": struct.pack("<2f", -1.75, math.nan),
    "values": struct.pack("<2f", 0.5, math.nan),
    "advantages": struct.pack("<2f", 0.25, math.nan),
    "returns": struct.pack("<2f", 0.75, math.nan),
}
EVALUATED = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 200, "errors": 1}


def write_version_1(path: Path, commit: str) -> None:
    """run.db after STEPS steps, each with one rollout and its arrays, and an evaluation at the last."""
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("PRAGMA journal_mode = WAL")
    raw.executescript(VERSION_1)
    raw.executemany("INSERT INTO meta VALUES (?, ?)", COMMITS[commit].items())
    for step in range(1, STEPS + 1):
        raw.execute("INSERT INTO metrics VALUES ('reward', ?, ?, 10.0)", (step, step / 4))
        raw.execute(
            "INSERT INTO rollouts VALUES (?, ?, 'train', ?, 0, 0, 'user: 2 + 2 = ?', ?, '4', '4!', 1.0, '{}', 1, NULL, "
            "'[]', 0.0, 'stop', 0.25, 2, 10.0)",
            (step, step, str(2**63) if step == 1 else step, '[{"role": "user", "content": "2 + 2 = ?"}]'),
        )
        raw.executemany("INSERT INTO token_arrays VALUES (?, ?, ?)", [(step, *item) for item in BLOBS.items()])
    raw.execute(
        "INSERT INTO evaluations VALUES ('held-out', 'accuracy', ?, 0.5, 0.25, 0.75, 200, '{\"errors\": 1}', 10.0)",
        (STEPS,),
    )
    raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    raw.close()


def record(run: Run, step: int) -> None:
    """What `write_version_1` wrote of a step, by today's program."""
    judged = Reward(1.0, correct=True)
    rollout = Rollout([1, 2], [3, 4], [True, False], [-1.0, math.nan], [-1.5, math.nan], "stop", "4!", 0, reward=judged)
    prompt = Prompt(2**63 if step == 1 else step, messages=(Message("user", "2 + 2 = ?"),), answer="4")
    names = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
    arrays = {name: [[value]] for name, value in zip(names, (-1.25, -1.75, 0.5, 0.25, 0.75), strict=True)}
    run.log(step, {"reward": step / 4})
    run.record_rollouts(step, [RolloutGroup(prompt, [rollout])], arrays=arrays)
    if step == STEPS:
        run.record_evaluation(step, "held-out", {"accuracy": EVALUATED}, measure="accuracy")


def make(folder: Path, steps: int) -> Path:
    with Run.create(verb="ppo", config_toml="max_steps = 4\n", output_dir=folder) as run:
        for step in range(1, steps + 1):
            record(run, step)
    return folder


def make_old(folder: Path, commit: str) -> Path:
    """A run that was stopped after STEPS steps, its run.db as `commit` left it."""
    make(folder, STEPS)
    for path in folder.glob("run.db*"):
        path.unlink()
    write_version_1(folder / "run.db", commit)
    return folder


def contents(path: Path) -> dict[str, Any]:
    """All that a store says of a run, times apart; NaN by its name."""
    store = Store(path, read_only=True)
    rows = store.rollouts(limit=-1)
    found = {
        "series": {name: [point[:2] for point in store.metric_series(name)] for name in store.metric_names()},
        "rollouts": [{n: getattr(row, n) for n in row.__slots__ if n != "time"} for row in rows],
        "arrays": [{n: list(map(repr, v)) for n, v in store.rollout(row.id).arrays.items()} for row in rows],
        "evaluations": [each[:8] for each in store.evaluations()],
        "steps": (store.last_step(), store.metric_steps(), store.rollout_steps()),
    }
    store.close()
    return found


def version_of(path: Path) -> tuple[str, bool]:
    """(what the file says, whether it has version 2's table)."""
    raw = sqlite3.connect(path)
    version = raw.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()[0]
    table = raw.execute("SELECT count(*) FROM sqlite_master WHERE name = 'token_columns'").fetchone()[0]
    raw.close()
    return version, bool(table)


def migrate(path: Path) -> None:
    store = Store(path)
    store.rewind(STEPS)
    store.close()


def made_of(path: Path) -> list[tuple[str, ...]]:
    raw = sqlite3.connect(path)
    found = raw.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    raw.close()
    return found


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_run_is_shown_and_its_file_left_as_it_is(
    commit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, today = make_old(tmp_path / "old", commit), make(tmp_path / "today", STEPS)
    before = (folder / "run.db").read_bytes()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    old, new = json.loads(capsys.readouterr().out)
    assert old["verb"] == "ppo"
    assert old["evaluation"] == {"accuracy": EVALUATED}
    assert old["measure"] == COMMITS[commit].get("measure")
    assert {k for k in old if old[k] != new[k]} - {"folder", "started", "last", "measure"} == set()
    assert main(["runs", str(folder)]) == 0
    assert "accuracy 0.500 [0.250, 0.750] n=200, 1 not judged" in capsys.readouterr().out
    found = contents(folder / "run.db")
    assert found == contents(today / "run.db")
    assert found["arrays"][0]["mask"] == ["1", "0"]
    assert found["rollouts"][0]["prompt_key"] == 2**63
    assert (folder / "run.db").read_bytes() == before
    assert version_of(folder / "run.db") == ("1", False)


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_run_is_resumed_as_if_it_were_todays(commit: str, tmp_path: Path) -> None:
    folder, today = make_old(tmp_path / "old", commit), make(tmp_path / "today", STEPS + 1)
    before = (folder / "run.db").read_bytes()
    with Run.open(folder) as run:  # and is not continued after all: an option is refused
        assert (run.verb, run.store.last_step(), len(run.store.rollouts())) == ("ppo", STEPS, STEPS)
        run.flush()
    assert (folder / "run.db").read_bytes() == before
    with Run.open(folder) as run:
        run.rewind(2)
        for step in range(3, STEPS + 2):
            record(run, step)
        assert run.measure == "accuracy"
    assert contents(folder / "run.db") == contents(today / "run.db")
    assert version_of(folder / "run.db") == ("2", True)
    assert made_of(folder / "run.db") == made_of(today / "run.db")


def test_version_1_is_what_the_first_migration_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_version_1(tmp_path / "old.db", "82cd030")
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    schema._open_writer(tmp_path / "new.db").close()
    assert made_of(tmp_path / "new.db") == made_of(tmp_path / "old.db")
    assert version_of(tmp_path / "new.db") == ("1", False)


def test_a_newer_run_is_refused_by_name_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, "CREATE TABLE turns (rollout INTEGER);"])
        folder = make(tmp_path / "newer", 1)
    before = (folder / "run.db").read_bytes()
    refused = r"run\.db: schema version 3, this program reads 1 to 2; use the version of upslope named in"
    for read_only in (True, False):
        with pytest.raises(RunError, match=refused):
            Run.open(folder, read_only=read_only)
    assert (folder / "run.db").read_bytes() == before
    assert main(["runs", str(tmp_path)]) == 0
    assert "schema version 3" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["", "-1", "1.0", "one", "01"])
def test_what_is_no_version_is_refused(version: str, tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    store = Store(path)
    store.set_meta("schema_version", version)
    store.close()
    for read_only in (True, False):
        with pytest.raises(RunError, match=rf"run\.db: schema version {version}, this program"):
            Store(path, read_only=read_only)


def test_a_file_whose_making_was_cut_off_is_made_to_its_end_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    for cut in ("", VERSION_1.partition("CREATE INDEX")[0]):
        path.unlink(missing_ok=True)
        raw = sqlite3.connect(path)
        raw.executescript(f"PRAGMA journal_mode = WAL; {cut}")
        raw.close()
        with pytest.raises(RunError, match="schema version 0"):
            Store(path, read_only=True)
        Store(path).close()
        assert version_of(path) == ("2", True)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.db"
    write_version_1(path, "39a7a4f")
    expected = contents(path)
    with monkeypatch.context() as broken:
        broken.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, "DELETE FROM rollouts; SELECT no_such_column;"])
        for read_only in (True, False):
            with pytest.raises(RunError, match=r"run\.db: cannot open: no such column"):
                schema.connect(path, read_only=read_only)
    assert version_of(path) == ("1", False)
    assert contents(path) == expected
    migrate(path)
    assert contents(path) == expected


def test_a_killed_migration_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """Killed before each statement in turn, until one migration comes to its end."""
    program = """
        import os, signal, sqlite3, sys
        from upslope.runs import schema

        class Killed(sqlite3.Connection):
            left = int(sys.argv[2])

            def execute(self, *arguments):
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left -= 1
                return super().execute(*arguments)

        schema._connect.keywords["factory"] = Killed
        from upslope.runs.store import Store

        Store(sys.argv[1]).rewind(3)
    """
    path = tmp_path / "run.db"
    write_version_1(path, "82cd030")
    expected = contents(path)
    seen = []
    for statements in range(40):
        for each in tmp_path.glob("run.db*"):
            each.unlink()
        write_version_1(path, "82cd030")
        done = run_process([sys.executable, "-c", textwrap.dedent(program), str(path), str(statements)])
        seen.append(version_of(path))
        assert contents(path) == expected
        migrate(path)
        assert version_of(path) == ("2", True)
        assert contents(path) == expected
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert set(seen) == {("1", False), ("2", True)}
    assert len(seen) > 8


def test_a_new_column_is_one_migration_that_inserts_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, path = Prompt(1, text="x"), tmp_path / "run.db"
    groups = [RolloutGroup(prompt, [Rollout([1], [2, 3], [True, True], [-1.0, -1.0], [-1.0, -1.0], "stop", "y", 0)])]
    write_version_1(path, "39a7a4f")
    expected = contents(path)
    row = "INSERT INTO token_columns VALUES ('turn', 'uint8', 'little-endian');"
    with monkeypatch.context() as later:
        later.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, row])
        assert contents(path) == expected
        store = Store(path)
        store.add_rollouts(STEPS + 1, groups, arrays={"turn": [[0, 1]]})
        assert store.rollout(STEPS + 1).arrays["turn"] == [0, 1]
        store.close()
        assert contents(path)["arrays"][-1]["turn"] == ["0", "1"]
    with pytest.raises(RunError, match="schema version 3, this program reads 1 to 2"):
        Store(path)


def test_a_viewer_applies_what_changes_a_table_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.db"
    write_version_1(path, "39a7a4f")
    expected, before = contents(path), path.read_bytes()
    later = (
        "CREATE TABLE turns (rollout INTEGER NOT NULL REFERENCES rollouts (id), role TEXT NOT NULL);"
        "ALTER TABLE rollouts ADD COLUMN turn INTEGER NOT NULL DEFAULT 7;"
        "UPDATE rollouts SET turn = 8 WHERE id = 2;"
        "INSERT INTO turns SELECT id, 'user' FROM rollouts;"
    )
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, later])
    store = Store(path, read_only=True)
    assert store._rows("SELECT turn FROM rollouts ORDER BY id") == [(7,), (8,), (7,)]
    assert store._rows("SELECT * FROM turns ORDER BY rollout") == [(1, "user"), (2, "user"), (3, "user")]
    plan = store._rows("EXPLAIN QUERY PLAN SELECT * FROM rollouts WHERE step = 1")
    assert "rollouts_step" in plan[0][3]
    store.close()
    assert contents(path) == expected
    assert path.read_bytes() == before


def test_only_declared_columns_are_written_and_what_version_1_took_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    write_version_1(path, "82cd030")
    with sqlite3.connect(path) as raw:
        raw.execute("INSERT INTO token_arrays VALUES (1, 'curiosity', ?)", (struct.pack("<2f", 0.5, 1.5),))
    raw.close()
    store = Store(path)
    assert store.rollout(1).arrays["curiosity"] == [0.5, 1.5]
    with pytest.raises(
        ValueError, match=r"array 'curiosity' is no column of run\.db; those are advantages, divergence"
    ):
        store.add_rollouts(4, [], arrays={"curiosity": []})
    store.close()


def test_a_column_of_an_unknown_type_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    store = Store(path)
    store._connection.execute("UPDATE token_columns SET dtype = 'float7' WHERE name = 'values'")
    store.close()
    for read_only in (True, False):
        with pytest.raises(RunError, match=r"run\.db: token_columns has values as float7, little-endian, which this"):
            Store(path, read_only=read_only)
