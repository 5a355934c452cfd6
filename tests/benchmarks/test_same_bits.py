"""The comparison of two revisions' runs: hand-made run folders with one thing changed, and the table of new words."""

from __future__ import annotations

import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import same_bits
from benchmarks.same_bits import Revision
from benchmarks.same_bits_results import counted, differences, read_case, renamed

WEIGHTS = (1.0, -2.5, 0.0)


def safetensors(path: Path, values: tuple[float, ...], dtype: str = "F32") -> None:
    data = struct.pack(f"<{len(values)}f", *values)
    header = json.dumps({"w": {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def metrics(path: Path, loss: float, seconds: float) -> None:
    lines = [{"step": 1, "time": seconds, "loss": loss, "seconds/update": seconds}, {"step": 1, "eval/loss": 2.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_folder(folder: Path, *, seconds: float = 1.0) -> Path:
    """A case's folder with one run of one step and one rollout."""
    checkpoint = folder / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    safetensors(checkpoint / "critic.safetensors", WEIGHTS)
    (checkpoint / "state.json").write_text(json.dumps({"stop": {"seconds": seconds, "steps": 1}, "queue": []}))
    (checkpoint.parent / "last").symlink_to(checkpoint.name)
    (folder / "log").write_text(f"took {seconds}")
    metrics(folder / "run" / "metrics.jsonl", 0.25, seconds)
    database = sqlite3.connect(folder / "run" / "run.db")
    database.execute("CREATE TABLE rollouts (id INTEGER PRIMARY KEY, completion TEXT, reward REAL, time REAL)")
    database.execute("CREATE TABLE token_arrays (rollout INTEGER, name TEXT, data BLOB)")
    database.execute("INSERT INTO rollouts VALUES (1, 'ab', 0.5, ?)", [seconds])
    database.execute("INSERT INTO token_arrays VALUES (1, 'tokens', ?)", [struct.pack("<2i", 7, 9)])
    database.commit()
    database.close()
    return folder


def changed(tmp_path: Path, change: Callable[[Path], object]) -> list[str]:
    """What is found when the second of two equal runs is changed."""
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two", seconds=2.0)
    change(two / "run")
    return [str(found) for found in differences(read_case(one), read_case(two))]


def test_equal_runs_are_equal_whatever_time_they_took(tmp_path: Path) -> None:
    assert changed(tmp_path, lambda run: None) == []
    amounts = counted(read_case(tmp_path / "one"))
    assert amounts == {
        "tensors": 1, "tensor values": 3, "metrics": 2, "rollouts": 1, "token arrays": 1, "cells of run.db": 3,
        "other values": 3,
    }  # fmt: skip


def write_tokens(run: Path) -> None:
    database = sqlite3.connect(run / "run.db")
    database.execute("UPDATE token_arrays SET data = ?", [struct.pack("<2i", 7, 8)])
    database.commit()
    database.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda run: safetensors(run / "checkpoints/step-00000001/critic.safetensors", (1.0, -2.5, -0.0)),
            "run/checkpoints/step-00000001/critic.safetensors: w[2]: 0.0 | -0.0 (1 of 3 values differ)",
        ),
        (
            lambda run: safetensors(run / "checkpoints/step-00000001/critic.safetensors", WEIGHTS, dtype="I32"),
            "run/checkpoints/step-00000001/critic.safetensors: w: F32[3] | I32[3]",
        ),
        (
            lambda run: metrics(run / "metrics.jsonl", 0.25000000000000006, 1.0),
            "run/metrics.jsonl: step 1: loss: 0.25 | 0.25000000000000006",
        ),
        (
            lambda run: (run / "checkpoints/step-00000001/critic.safetensors").unlink(),
            "run/checkpoints/step-00000001/critic.safetensors: w: F32[3] | (absent)",
        ),
        (write_tokens, "run/run.db: token_arrays 1 tokens data[1]: 9 | 8 (1 of 2 values differ)"),
        (
            lambda run: (run / "predictions.tsv").write_text("x"),
            "run/predictions.tsv: bytes: (absent) | '2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881'",
        ),
    ],
)
def test_one_change_is_named_with_both_values(change: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    assert changed(tmp_path, change) == [told]


def test_what_was_renamed_is_compared_under_its_new_name(tmp_path: Path) -> None:
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    critic = two / "run/checkpoints/step-00000001/critic.safetensors"
    critic.rename(critic.with_name("value.safetensors"))
    names = [(r"/critic\.safetensors: ", "/value.safetensors: ")]
    assert len(differences(read_case(one), read_case(two))) == 2
    assert differences(renamed(read_case(one), names), renamed(read_case(two), names)) == []


def test_no_renaming_lets_a_value_fall_under_the_table() -> None:
    assert renamed({"a: x": 1, "a: y": 2}, [("[xy]$", "z")]) == {"a: z": 1, "a: z #2": 2}


def test_what_has_no_name_left_is_not_compared() -> None:
    assert renamed({"a: x": 1, "b: x": 2}, [("^a: .*$", "")]) == {"b: x": 2}


def test_a_case_is_spelled_as_the_revision_spells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(same_bits.CASES, "mine", ("ppo --num-epochs 4 --critic separate", "ppo --resume"))
    monkeypatch.setattr(same_bits, "WORDS", (("ppo", "--num-epochs", "--passes"), ("ppo", "--critic separate", "")))
    spelled = {}
    for name, text in (("old", "--num-epochs INT  --critic {shared,separate}"), ("new", "--passes INT  --critic-lr")):
        revision = Revision(".", None, tmp_path / name, tmp_path)
        revision.helps["ppo"] = text
        spelled[name] = [" ".join(words) for words in revision.commands("mine")]
    (old, again), (new, once_more) = spelled["old"], spelled["new"]
    assert old.startswith("ppo --output-dir runs/mine/run ")
    assert old.endswith(" --num-epochs 4 --critic separate")
    assert new == old.replace("--num-epochs 4 --critic separate", "--passes 4")
    assert again == once_more == "ppo --resume"


def test_a_pair_that_holds_nothing_or_has_failed_is_never_the_same(tmp_path: Path) -> None:
    def verdict(problem: str) -> dict:
        return same_bits.verdict_on("ppo", ("a", "b"), [(tmp_path / "one", problem), (tmp_path / "two", "")])

    run_folder(tmp_path / "one")
    run_folder(tmp_path / "two")
    assert verdict("")["failures"] == verdict("")["differences"] == []
    assert verdict("exit code 2")["failures"] == ["a: exit code 2"]
    for side in ("one", "two"):
        shutil.rmtree(tmp_path / side / "run" / "checkpoints")
    assert verdict("")["failures"] == ["no tensors that both have"]
