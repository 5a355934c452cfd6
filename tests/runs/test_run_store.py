from __future__ import annotations

import math
import sqlite3
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.errors import RunError
from upslope.runs.encoding import pack, to_json, unpack
from upslope.runs.store import Store
from upslope.types import Message, Prompt, Reward, Rollout, RolloutGroup


def rollout(sample: int, *, mask: list[bool] | None = None, **reward: Any) -> Rollout:
    mask = mask or [True, True, True]
    logprobs = [-0.5 * (i + 1) if sampled else math.nan for i, sampled in enumerate(mask)]
    return Rollout(
        [5, 6], list(range(10, 10 + len(mask))), mask, logprobs, [2 * x for x in logprobs], "stop",
        f"completion {sample}", sample, version=4, reward=Reward(**{"value": 1.0, **reward}),
    )  # fmt: skip


def store_with(path: Path, groups: list[RolloutGroup], **options: Any) -> Store:
    store = Store(path / "run.db")
    store.add_rollouts(7, groups, **options)
    return store


def test_a_rollout_comes_back_whole(tmp_path: Path) -> None:
    prompt = Prompt(key=2**63 + 5, messages=(Message("system", "Add."), Message("user", "2 + 2 = ?")), answer="4")
    judged = rollout(
        3, mask=[True, False, True], parts={"exact": 1.0, "format": 0.5}, correct=True, seconds=0.25, steps=[(2, 0.5)]
    )
    arrays = {
        "values": [np.array([0.1, 0.2, 0.3], dtype=np.float32)],
        "advantages": [[1.0, 3.0]],  # one per sampled token
        "ref_logprobs": [None],
    }
    store = store_with(tmp_path, [RolloutGroup(prompt, [judged])], arrays=arrays)
    (row,) = store.rollouts()
    assert (row.step, row.split, row.prompt_key, row.sample, row.version) == (7, "train", 2**63 + 5, 3, 4)
    assert row.prompt == "system: Add.\n\nuser: 2 + 2 = ?"
    assert row.messages == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2 = ?"}]
    assert (row.answer, row.completion, row.reward, row.parts) == ("4", "completion 3", 1.0, judged.reward.parts)
    assert (row.correct, row.error, row.process_rewards, row.reward_seconds) == (True, None, [(2, 0.5)], 0.25)
    assert (row.finish_reason, row.advantage, row.length) == ("stop", 2.0, 3)
    stored = store.rollout(row.id)
    assert stored.row == row
    assert set(stored.arrays) == {
        "prompt_tokens", "tokens", "mask", "sampling_logprobs", "policy_logprobs", "values", "advantages",
    }  # fmt: skip
    assert stored.arrays["tokens"] == [10, 11, 12]
    assert stored.arrays["mask"] == [1, 0, 1]
    assert stored.arrays["prompt_tokens"] == [5, 6]
    assert stored.arrays["values"] == np.array([0.1, 0.2, 0.3], dtype=np.float32).tolist()
    assert stored.arrays["advantages"][0] == 1.0
    assert stored.arrays["advantages"][2] == 3.0
    assert math.isnan(stored.arrays["advantages"][1])
    assert math.isnan(stored.arrays["policy_logprobs"][1])
    assert stored.arrays["sampling_logprobs"][0] == -0.5
    with pytest.raises(KeyError):
        store.rollout(99)
    store.close()


def test_blobs_are_little_endian_float32_and_int32(tmp_path: Path) -> None:
    store_with(tmp_path, [RolloutGroup(Prompt(key=1, text="x"), [rollout(0)])]).close()
    with sqlite3.connect(tmp_path / "run.db") as raw:
        blobs = dict(raw.execute("SELECT name, data FROM token_arrays").fetchall())
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()
    assert blobs["tokens"] == struct.pack("<3i", 10, 11, 12)
    assert blobs["policy_logprobs"] == struct.pack("<3f", -1.0, -2.0, -3.0)
    assert blobs["mask"] == b"\x01\x01\x01"


def test_misfitting_arrays_are_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.db")
    groups = [RolloutGroup(Prompt(key=1, text="x"), [rollout(0), rollout(1)])]
    for arrays, message in [
        ({"values": [[1.0] * 3]}, "1 entries for 2 rollouts"),
        ({"values": [[1.0] * 3, [1.0] * 4]}, "4 values for a rollout of 3 tokens"),
        ({"tokens": [[1] * 3, [1] * 3]}, "another name"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.add_rollouts(1, groups, arrays=arrays)
    with pytest.raises(ValueError, match="1 advantages for 2"):
        store.add_rollouts(1, groups, advantages=[0.5])
    short = rollout(0)
    short.policy_logprobs = [0.0]
    with pytest.raises(ValueError, match="1 values in 'policy_logprobs'"):
        store.add_rollouts(1, [RolloutGroup(Prompt(key=1, text="x"), [rollout(0), short])])
    assert store.rollouts() == []
    store.close()


def test_filters(tmp_path: Path) -> None:
    first = RolloutGroup(
        Prompt(key=1, text="one 100%"), [rollout(0, value=0.0, correct=False), rollout(1, value=2.0, correct=True)]
    )
    second = RolloutGroup(Prompt(key=2, text="two"), [rollout(0, value=None, error="timed out"), rollout(1, value=1.0)])
    store = store_with(tmp_path, [first, second], advantages=[-1.0, 1.0, None, 0.0])
    store.add_rollouts(8, [second], split="held_out")

    def ids(**options: Any) -> list[int]:
        return [row.id for row in store.rollouts(**options)]

    assert ids() == [1, 2, 3, 4, 5, 6]
    assert ids(step=7, prompt_key=2) == [3, 4]
    assert ids(split="held_out") == [5, 6]
    assert ids(sample=1, limit=2) == [2, 4]
    assert store.rollout_steps() == [(7, 4)]
    assert store.rollout_steps("held_out") == [(8, 2)]
    with pytest.raises(ValueError, match="unknown filter"):
        ids(colour="red")
    store.close()


def test_metrics_and_evaluations(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.db")
    store.add_metrics(1, {"reward": 0.5, "loss": math.nan}, wall_time=10.0)
    store.add_metrics(2, {"reward": 0.75}, wall_time=11.0)
    store.add_metrics(2, {"reward": 1.0}, wall_time=12.0)
    assert store.metric_names() == ["loss", "reward"]
    assert store.metric_series("reward") == [(1, 0.5, 10.0), (2, 1.0, 12.0)]
    assert store.metric_series("reward", after=1) == [(2, 1.0, 12.0)]
    assert math.isnan(store.metric_series("loss")[0].value)
    store.add_evaluation(2, "gsm8k", {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 500, "k": 4}, "bits": 2})
    first, second = store.evaluations("gsm8k")
    assert first[:8] == (2, "gsm8k", "accuracy", 0.5, 0.4, 0.6, 500, {"k": 4})
    assert second[:8] == (2, "gsm8k", "bits", 2.0, None, None, None, {})
    store.close()


def test_rewinding_takes_the_arrays_along(tmp_path: Path) -> None:
    store = store_with(tmp_path, [RolloutGroup(Prompt(key=1, text="x"), [rollout(0)])])
    store.add_rollouts(8, [RolloutGroup(Prompt(key=1, text="x"), [rollout(0)])])
    store.rewind(7)
    store.close()
    raw = sqlite3.connect(tmp_path / "run.db")
    assert raw.execute("SELECT DISTINCT rollout FROM token_arrays").fetchall() == [(1,)]
    raw.close()


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.db")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                store.add_metrics(step, {f"m{number}": float(step)})
                store.metric_series(f"m{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(len(store.metric_series(f"m{number}")) == 20 for number in range(4))
    store.close()


def test_a_quota_that_sqlite_calls_an_input_output_error_has_a_remedy(tmp_path: Path) -> None:
    """Tried with a limit on the size of files, and on a disk without space for SQLite's shared memory."""
    limited = "import resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (20_000, 20_000)); "
    limited += "from upslope.runs.store import Store; Store(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", limited, str(tmp_path / "run.db")], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("quota used up? free some space, then continue with --resume")


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path) -> None:
    store = store_with(tmp_path, [RolloutGroup(Prompt(key=1, text="x"), [rollout(0)])])
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite itself then reports a full disk.
    big = RolloutGroup(Prompt(key=2, text="y" * 200_000), [rollout(0)])
    with pytest.raises(RunError, match=r"run\.db: cannot write: the disk is full.*--resume"):
        store.add_rollouts(8, [big])
    assert [row.step for row in store.rollouts()] == [7]
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.add_rollouts(8, [big])
    assert len(store.rollouts()) == 2
    store.close()


def test_a_locked_database_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "run.db")
    store._connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match="another process holds it"):
        store.add_metrics(1, {"a": 1.0})
    other.execute("ROLLBACK")
    other.close()
    store.add_metrics(1, {"a": 1.0})
    store.close()


def test_foreign_and_future_databases_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_text("this is a text file, and long enough to be looked at" * 40)
    with pytest.raises(RunError, match=r"run\.db: cannot open: .*damaged"):
        Store(tmp_path / "run.db")
    with pytest.raises(RunError, match="no such file"):
        Store(tmp_path / "none.db", read_only=True)
    newer = tmp_path / "newer.db"
    store = Store(newer)
    store.set_meta("schema_version", "99")
    store.close()
    for read_only in (True, False):
        with pytest.raises(RunError, match="schema version 99"):
            Store(newer, read_only=read_only)


def test_a_read_only_store_cannot_write_and_special_names_work(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%20"
    folder.mkdir()
    Store(folder / "run.db").close()
    store = Store(folder / "run.db", read_only=True)
    with pytest.raises(RunError, match="readonly"):
        store.add_metrics(1, {"a": 1.0})
    store.close()


float32 = st.floats(width=32, allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(st.lists(float32), st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packing_keeps_every_bit(floats: list[float], integers: list[int]) -> None:
    assert [struct.pack("<f", x) for x in unpack(pack(floats, "float32"), "float32")] == [
        struct.pack("<f", x) for x in floats
    ]
    assert unpack(pack(np.array(integers, dtype=np.int64), "int32"), "int32") == integers


def test_json_is_strict() -> None:
    value = {"a": math.inf, "b": [math.nan, np.float32(0.5), np.arange(2)], 3: (1, None), "p": Path("x")}
    assert to_json(value) == '{"a": "Infinity", "b": ["NaN", 0.5, [0, 1]], "3": [1, null], "p": "x"}'


actions = st.lists(
    st.tuples(st.sampled_from(["log", "rewind"]), st.integers(0, 6), st.sampled_from(["a", "b"])), max_size=25
)


@settings(max_examples=40, deadline=None)
@given(actions)
def test_the_store_agrees_with_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[str, int, str]]
) -> None:
    store = Store(tmp_path_factory.mktemp("store") / "run.db")
    model: dict[tuple[str, int], float] = {}
    for number, (action, step, name) in enumerate(plan):
        if action == "log":
            store.add_metrics(step, {name: float(number)})
            model[name, step] = float(number)
        else:
            store.rewind(step)
            model = {key: value for key, value in model.items() if key[1] <= step}
    for name in ("a", "b"):
        expected = sorted((step, value) for (each, step), value in model.items() if each == name)
        assert [point[:2] for point in store.metric_series(name)] == expected
    store.close()
