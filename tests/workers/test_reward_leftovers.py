"""What a reward starts ends with the job, the worker or the trainer, also when it has left its session and parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reward_kit import alive, gone, group, values

from upslope.workers.process import children, end_descendants
from upslope.workers.rewards import RewardPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only a process group is found")

SOURCE = """
import asyncio, os, subprocess, sys, time

FILE = os.environ["PIDS"]
SLEEP = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'a'), flush=True); time.sleep(1000)"

def start(kind):
    command = [sys.executable, "-S", "-c", SLEEP, FILE]
    before = count()
    if kind == "child":
        subprocess.Popen(command)
    elif kind == "session":
        subprocess.Popen(command, start_new_session=True)
    elif kind == "daemon":
        child = os.fork()
        if child == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, command)
            os._exit(0)
        os.waitpid(child, 0)
    while count() == before:
        time.sleep(0.01)

def count():
    return len(open(FILE).readlines())

def fn(prompts, completions):
    for text in completions:
        kind, _, then = text.partition("-")
        start(kind)
        if then == "hang": time.sleep(1000)
        if then == "die": os._exit(1)
    return [1.0] * len(completions)

async def later(prompts, completions):
    (text,) = completions
    start(text)
    await asyncio.sleep(1000 if text == "session" else 0)
    return [1.0]
"""
KINDS = ["child", "session", "daemon"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "rewards.py").write_text(SOURCE)
    (tmp_path / "pids").write_text("")
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    yield str(tmp_path / "rewards.py")
    for pid in started(tmp_path):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def started(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "pids").read_text().split()]


def wait_for(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 20
    while len(started(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return started(folder)


def test_a_daemon_ends_with_its_job_and_a_child_with_its_worker(file: str, tmp_path: Path) -> None:
    one = group(KINDS)
    with RewardPool(None, [f"{file}:fn"]) as pool:
        pool.judge([one])
        child, session, daemon = started(tmp_path)
        assert gone(daemon)
        assert alive(child)
        assert alive(session)
        pool.judge([group(["child"])])  # by the same worker: it may still use them
        assert alive(child)
    assert values(one) == [1.0] * 3
    assert gone(*started(tmp_path))


@pytest.mark.parametrize("then", ["hang", "die"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ends_with_a_job_that_hangs_or_dies(file: str, tmp_path: Path, kind: str, then: str) -> None:
    one = group([f"{kind}-{then}", "none-"])
    (tmp_path / "rewards.py").write_text(SOURCE.replace("start(kind)\n", "kind == 'none' or start(kind)\n"))
    with RewardPool(None, [f"{file}:fn"], timeout_s=1.5) as pool:
        pool.judge([one])
        assert values(one) == [None, 1.0]
        assert len(started(tmp_path)) == 2  # in the group's job, then in its own
        assert gone(*started(tmp_path))


def test_all_ends_with_an_await_that_times_out(file: str, tmp_path: Path) -> None:
    one = group(["session", "child"])
    with RewardPool(None, [f"{file}:later"], timeout_s=2.0) as pool:
        pool.judge([one])
        assert values(one) == [None, 1.0]
        assert len(started(tmp_path)) == 2
        assert gone(*started(tmp_path))


def test_a_server_started_while_loading_serves_until_the_end(file: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(SOURCE + "\nstart('daemon')\n")
    with RewardPool(None, [f"{file}:fn"]) as pool:
        for _ in range(2):
            pool.judge([group(["daemon"])])
        server, first, second = started(tmp_path)
        assert gone(first, second)
        assert alive(server)
    assert gone(server)


PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from upslope.workers.rewards import RewardPool
from upslope.types import Prompt, Rollout, RolloutGroup
pool = RewardPool(None, [sys.argv[2] + ":fn"], timeout_s=60)
if sys.argv[4] == "forked" and os.fork() == 0:
    time.sleep(30)  # holds a copy of the worker's pipes
    os._exit(0)
pool.judge([RolloutGroup(Prompt(0, text="q"), [Rollout([1], [2], [True], [0.0], [0.0], "stop", sys.argv[3], 0)])])
"""


@pytest.mark.parametrize("forked", ["", "forked"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ends_with_a_killed_trainer(root: Path, file: str, tmp_path: Path, kind: str, forked: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(root / "src"), file, f"{kind}-hang", forked]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        (pid,) = wait_for(tmp_path, 1)
        assert alive(pid)
        process.kill()
        assert gone(pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_keeper_takes_its_worker_along(file: str, tmp_path: Path, number: int) -> None:
    with RewardPool(None, [f"{file}:fn"]) as pool:
        pool.judge([group(["child"])])
        (worker,) = children(pool._workers[0].process.pid)
        pool._workers[0].process.send_signal(number)
        assert gone(worker)
        one = group(["child"])
        pool.judge([one])
        assert values(one) == [1.0]


def test_end_descendants_spares_what_it_is_told_to(tmp_path: Path) -> None:
    script = "sleep 1000 & echo $!; sh -c 'sleep 1000 & echo $!; echo $$; wait' & wait"
    tree = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert tree.stdout is not None
    first, inner, second = (int(tree.stdout.readline()) for _ in range(3))
    try:
        assert children(tree.pid) == {first, second}
        end_descendants(tree.pid, frozenset({second}))
        assert gone(first)
        assert alive(second)
        assert alive(inner)
        end_descendants(tree.pid)
        assert gone(second, inner)
    finally:
        tree.kill()
        tree.communicate()
    assert children(tree.pid) == set()
