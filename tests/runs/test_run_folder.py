from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.errors import RunError
from upslope.runs.folder import Run
from upslope.runs.lines import MetricLines, read_lines
from upslope.types import Message, Prompt, Reward, Rollout, RolloutGroup

CONFIG = 'task = "sums"\nlearning_rate = 1e-05\n'


def make(folder: Path) -> Run:
    return Run.create(output_dir=folder, verb="ppo", config_toml=CONFIG)


def group(key: int, rewards: list[float]) -> RolloutGroup:
    rollouts = [
        Rollout([1, 2], [3, 4], [True, True], [-1.0, -2.0], [-1.5, -2.5], "stop", f"r{i}", i, reward=Reward(value))
        for i, value in enumerate(rewards)
    ]
    return RolloutGroup(Prompt(key=key, messages=(Message("user", f"question {key}"),)), rollouts)


def contents(run: Run) -> tuple[object, ...]:
    """Everything a viewer sees, times apart."""
    lines = [{key: value for key, value in line.items() if key != "time"} for line in run.metric_lines()]
    series = {name: [point[:2] for point in run.store.metric_series(name)] for name in run.store.metric_names()}
    rollouts = [
        (row.id, row.step, row.prompt_key, row.reward, row.advantage, run.store.rollout(row.id).arrays)
        for row in run.store.rollouts(limit=-1)
    ]
    return lines, series, rollouts, [each[:8] for each in run.store.evaluations()]


def record(run: Run, step: int) -> None:
    run.log(step, {"reward": step / 7, "policy/approx_kl": 0.1 * step})
    run.record_rollouts(step, [group(step, [0.0, 1.0])], arrays={"values": [[0.5, 0.25], [step, step]]})
    run.record_evaluation(step, "held_out", {"accuracy": {"value": step / 10, "low": 0.0, "high": 1.0, "n": 500}})


def test_a_new_run_has_the_promised_files(tmp_path: Path) -> None:
    with Run.create(tmp_path / "runs", verb="ppo", config_toml=CONFIG, environment={"device": "cpu"}) as run:
        run.log(1, {"reward": 0.25})
        run.summary({"accuracy": {"ppo": {"value": 0.5}}, "seconds": 3.0, "bad": math.nan})
        assert run.folder.parent == tmp_path / "runs"
        assert re.fullmatch(r"ppo-\d{4}-\d{6}", run.folder.name)
        assert {path.name for path in run.folder.iterdir()} >= {
            "config.toml", "env.json", "metrics.jsonl", "run.db", "checkpoints", "summary.json",
        }  # fmt: skip
        assert (run.folder / "config.toml").read_text() == CONFIG
        assert run.config == tomllib.loads(CONFIG)
        assert run.verb == "ppo"
        environment = json.loads((run.folder / "env.json").read_text())
        assert environment["python"].startswith("3.")
        assert environment["torch"]
        assert environment["transformers"]
        assert environment["threads"] >= 1
        assert environment["device"] == "cpu"
        assert environment["verb"] == "ppo"
        assert environment["command"]
        assert run.result == {"accuracy": {"ppo": {"value": 0.5}}, "seconds": 3.0, "bad": "NaN"}


def test_names_are_unique_and_can_be_given(tmp_path: Path) -> None:
    runs = [Run.create(tmp_path, verb="sft", config_toml=CONFIG) for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    named = Run.create(tmp_path, verb="sft", config_toml=CONFIG, name="first")
    assert named.folder == tmp_path / "sft-first"
    with pytest.raises(RunError, match="already holds a run"):
        Run.create(tmp_path, verb="sft", config_toml=CONFIG, name="first")
    with pytest.raises(RunError, match="plain file name"):
        Run.create(tmp_path, verb="sft", config_toml=CONFIG, name="../x")
    for run in [*runs, named]:
        run.close()


def test_an_output_folder_is_never_taken_from_something_else(tmp_path: Path) -> None:
    make(tmp_path / "run").close()
    with pytest.raises(RunError, match="--resume"):
        make(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "words"
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot make the run folder"):
        make(tmp_path / "file" / "run")


def test_a_half_made_folder_can_be_taken_but_not_one_with_metrics(tmp_path: Path) -> None:
    make(tmp_path).close()
    (tmp_path / "config.toml").unlink()  # It is written last: this is what a kill during `create` leaves.
    (tmp_path / ".upslope-tmp-1-00000000-0-config.toml").write_text("half")
    with make(tmp_path) as run:
        assert not list(tmp_path.glob(".upslope-tmp-*-config.toml"))
        run.log(1, {"loss": 1.0})
    (tmp_path / "config.toml").unlink()
    with pytest.raises(RunError, match=r"without config\.toml"):
        make(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_an_unwritable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="--output-dir") as caught:
        make(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


def test_metrics_must_be_numbers_at_a_valid_step(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(0, {"a": np.float32(0.5), "b": np.array([3]), "c": True, "d": math.nan, "e": -math.inf})
        with pytest.raises(TypeError, match="'text'"):
            run.log(1, {"text": "high"})
        with pytest.raises(ValueError, match="step"):
            run.log(-1, {"a": 1.0})
        with pytest.raises(ValueError, match="'time'"):
            run.log(1, {"time": 1.0})
        (line,) = run.metric_lines()
        assert {key: line[key] for key in "abcde"} == {"a": 0.5, "b": 3, "c": 1, "d": "NaN", "e": "-Infinity"}
        assert line["step"] == 0
        assert line["time"] > 1e9
        assert math.isnan(run.store.metric_series("d")[0].value)
        assert run.store.metric_series("e")[0].value == -math.inf


def test_rewinding_equals_never_having_gone_on(tmp_path: Path) -> None:
    with make(tmp_path / "straight") as straight:
        for step in range(1, 7):
            record(straight, step)
        with make(tmp_path / "resumed") as stopped:
            for step in range(1, 6):
                record(stopped, step)
        with Run.open(tmp_path / "resumed") as resumed:
            resumed.rewind(3)
            assert resumed.store.last_step() == 3
            for step in range(4, 7):
                record(resumed, step)
            assert contents(resumed) == contents(straight)
            assert len(resumed.environment["earlier"]) == 1


def test_a_summary_outlives_opening_but_not_new_steps(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, {"a": 1.0})
        run.summary({"n": 1})
    with Run.open(tmp_path) as run:
        assert run.result == {"n": 1}
        run.log(2, {"a": 1.0})
        assert run.result is None


def test_replacing_the_configuration_keeps_the_old_one(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.replace_config(CONFIG)
        run.replace_config("max_steps = 7\n")
        run.replace_config("max_steps = 8\n")
        assert run.config == {"max_steps": 8}
    assert (tmp_path / "config.1.toml").read_text() == CONFIG
    assert (tmp_path / "config.2.toml").read_text() == "max_steps = 7\n"


def test_viewers_read_while_the_writer_writes_and_cannot_write(tmp_path: Path) -> None:
    with make(tmp_path) as run, Run.open(tmp_path, read_only=True) as viewer:
        record(run, 1)
        assert contents(viewer) == contents(run)
        writer = viewer.writer()
        assert writer is not None
        assert writer["pid"] == os.getpid()
        for write in (lambda: viewer.log(2, {"a": 1.0}), lambda: viewer.rewind(0), lambda: viewer.summary({})):
            with pytest.raises(RunError, match="read-only"):
                write()
    with Run.open(tmp_path, read_only=True) as viewer:
        assert viewer.writer() is None


def test_one_writer_per_run_in_one_process(tmp_path: Path) -> None:
    with make(tmp_path):
        with pytest.raises(RunError, match="this process already"):
            Run.open(tmp_path)
        with pytest.raises(RunError, match="this process already"):
            Run.open(tmp_path)
    with Run.open(tmp_path), pytest.raises(RunError, match="this process already"):
        Run.open(tmp_path)
    Run.open(tmp_path).close()


HOLDER = """
import os, sys, time
from upslope.runs.folder import Run
run = Run.create(output_dir=sys.argv[1], verb="ppo", config_toml="")
run.log(1, {"a": 1.0})
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_no_lock_even_with_an_orphan(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    orphan = int(holder.stdout.readline())
    try:
        with Run.open(folder, read_only=True) as viewer:
            assert (viewer.writer() or {})["pid"] == holder.pid
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            Run.open(folder)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Run.open(folder) as run:
            assert [line["step"] for line in run.metric_lines()] == [1]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        os.kill(orphan, signal.SIGKILL)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(0, 4), cut=st.integers(0, 400), garbage=st.sampled_from([b"", b"\x00\x00\x00", b"[1"]))
def test_a_torn_last_line_is_repaired(
    tmp_path_factory: pytest.TempPathFactory, steps: int, cut: int, garbage: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = MetricLines(path)
    for step in range(steps):
        lines.append({"step": step, "text": "é" * step, "nested": {"a": 1}})
    lines.close()
    whole = path.read_bytes()
    torn = whole[: max(0, len(whole) - cut)] + (garbage if cut else b"")
    path.write_bytes(torn)
    repaired = MetricLines(path)
    survivors = list(read_lines(path))
    repaired.append({"step": 99})
    repaired.close()
    assert [line["step"] for line in read_lines(path)] == [*range(len(survivors)), 99]
    # A line that lacks only its newline is whole; nothing whole is lost.
    assert len(survivors) >= torn.count(b"\n")
    assert path.read_bytes().count(b"\n") == len(survivors) + 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, {"a": 1.0})
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(b"oops\n")
        run.log(2, {"a": 1.0})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(RunError, match=r"metrics\.jsonl:2: .*delete that line"):
            run.rewind(1)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_viewer_does_not_see_half_a_line(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.log(1, {"a": 1.0})
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 2')
        assert [line["step"] for line in run.metric_lines()] == [1]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path) as run:
        run.log(1, {"a": 1.0})
        real = os.write
        calls = iter([5, None])

        def write(descriptor: int, data: memoryview) -> int:
            allowed = next(calls)
            if allowed is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data[:allowed])

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(RunError, match=r"metrics\.jsonl: cannot write: the disk is full.*--resume"):
            run.log(2, {"a": 1.0})
        monkeypatch.undo()
        run.log(3, {"a": 1.0})
        assert [line["step"] for line in run.metric_lines()] == [1, 3]


def test_runs_do_not_import_torch() -> None:
    script = (
        "import sys, upslope.runs; print([m for m in ('torch', 'numpy', 'transformers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
