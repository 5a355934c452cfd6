"""Rewards that fork, scribble or stop: every completion gets its own reward or an error, and no wait is for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reward_kit import errors, group, values

from upslope.errors import RunError
from upslope.workers.rewards import RewardPool

SOURCE = """
import ctypes, gc, json, multiprocessing, os, stat, struct, sys, threading, time
from concurrent.futures import ProcessPoolExecutor

def numbers(completions):
    return [float(text) for text in completions]

def child_returns(prompts, completions):
    os.fork()
    return numbers(completions)

def parent_is_late(prompts, completions):
    if os.fork():
        time.sleep(0.05)
    return numbers(completions)

def child_returns_rubbish(prompts, completions):
    return [-1.0] * len(completions) if os.fork() == 0 else numbers(completions)

def child_raises(prompts, completions):
    if os.fork() == 0:
        raise RuntimeError("the child's own trouble")
    return numbers(completions)

def child_exits(prompts, completions):
    child = os.fork()
    if child == 0:
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    return numbers(completions)

def c_forks(prompts, completions):
    ctypes.CDLL(None).fork()
    return numbers(completions)

async def async_child_returns(prompts, completions):
    os.fork()
    return numbers(completions)

def runs_a_pool(prompts, completions):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(float, completions)

executor = None

def keeps_a_pool(prompts, completions):
    global executor
    executor = executor or ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    return [executor.submit(os.getpid).result() + float(text) for text in completions]

RUBBISH = {
    "byte": b"\\0",
    "length": struct.pack("!i", 1000),
    "message": (lambda text: struct.pack("!i", len(text)) + text)(
        json.dumps({"rewards": [dict(value=9.0, parts={}, correct=None, error=None, seconds=0.0, steps=[])]}).encode()
    ),
    "much": b"{}" * 300_000,
}

def scribble(what):
    for file in range(3, 64):
        try:
            mode = os.fstat(file).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                os.write(file, RUBBISH[what])
        except OSError:
            pass


def scribbles(prompts, completions):
    for text in completions:
        if text in RUBBISH:
            scribble(text)
    return [float(text) if text.isdigit() else 0.0 for text in completions]

def scribbles_later(prompts, completions):
    threading.Timer(0.1, scribble, ["byte"]).start()
    return numbers(completions)

def stops_halfway(prompts, completions):
    if "half" in completions:
        (channel,) = [one for one in gc.get_objects() if type(one).__name__ == "Channel"]
        channel.put(1, b"x" * 100)
        os.write(channel.fileno(), channel.unsent[:60])
        time.sleep(60)
    return numbers(completions)

def pids(prompts, completions):
    return [float(os.getpid())] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(SOURCE)
    return str(tmp_path / "rewards.py")


@pytest.mark.parametrize(
    "name",
    [
        "child_returns",
        "parent_is_late",
        "child_returns_rubbish",
        "child_raises",
        "child_exits",
        "c_forks",
        "async_child_returns",
        "runs_a_pool",
    ],
)
def test_every_completion_gets_its_own_reward_from_a_reward_that_forks(file: str, name: str) -> None:
    texts = [["1", "2"], ["3"], ["4", "5", "6"], ["7"], ["8", "9"], ["10", "11", "12"], ["13", "14"]]
    groups = [group(some, key=key) for key, some in enumerate(texts)]
    with RewardPool(None, [f"{file}:{name}"]) as pool:
        counts = pool.judge(groups[:4])
        pool.judge(groups[4:])
    assert [values(one) for one in groups] == [[float(text) for text in some] for some in texts]
    assert counts["reward/errors"] == 0


def test_a_pool_that_a_reward_keeps_serves_all_its_jobs(file: str) -> None:
    groups = [group(["0", "1"], key=key) for key in range(4)]
    with RewardPool(None, [f"{file}:keeps_a_pool"]) as pool:
        pool.judge(groups)
    first = values(groups[0])[0] or 0.0
    assert [values(one) for one in groups] == [[first, first + 1.0]] * 4


def test_a_file_that_forks_while_it_loads_makes_one_worker(file: str, tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(
        "import os, time\nif os.fork(): time.sleep(0.3)\n"
        "def fn(prompts, completions): return [float(text) for text in completions]\n"
    )
    groups = [group(["1", "2"]), group(["3"]), group(["4"])]
    with RewardPool(None, [f"{tmp_path / 'loads.py'}:fn"]) as pool:
        pool.judge(groups)
    assert [values(one) for one in groups] == [[1.0, 2.0], [3.0], [4.0]]


INLINE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from upslope.workers.rewards import make_scorer
from upslope.types import Prompt, Rollout, RolloutGroup
groups = [RolloutGroup(Prompt(0, text="q"), [Rollout([1], [2], [True], [0.0], [0.0], "stop", "7", 0)])]
with make_scorer(sys.argv[2] + ":Mine") as scorer:
    scorer.judge(groups)
print(type(scorer).__name__, groups[0].rollouts[0].reward.value, flush=True)
"""
MINE = """
import os, sys
from upslope.tasks import Task
{at_import}
class Mine(Task):
    inline_safe = True
    def prompts(self, split, count, seed): return []
    def rewards(self, prompts, completions):
        {at_call}
        return [float(text) for text in completions]
"""


@pytest.mark.parametrize(
    "places",
    [
        {"at_import": "", "at_call": "os.fork()"},
        {"at_import": "", "at_call": "if os.fork() == 0: raise SystemExit"},
        {"at_import": "os.fork()", "at_call": ""},
        {"at_import": "if os.fork() == 0: sys.exit()", "at_call": ""},
    ],
)
def test_a_fork_in_the_trainers_own_process_is_no_second_trainer(
    root: Path, tmp_path: Path, places: dict[str, str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE.format(**places))
    command = [sys.executable, "-c", INLINE, str(root / "src"), str(tmp_path / "mine.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "InlineJudge 7.0\n"


@pytest.mark.parametrize("what", ["byte", "length", "message", "much"])
def test_rubbish_among_the_answers_is_an_error_of_its_sample(file: str, what: str) -> None:
    groups = [group(["1", what, "3"]), group(["4", "5"])]
    started = time.monotonic()
    with RewardPool(None, [f"{file}:scribbles"], timeout_s=20.0) as pool:
        counts = pool.judge(groups)
    assert [values(one) for one in groups] == [[1.0, None, 3.0], [4.0, 5.0]]
    assert "answer was garbled" in errors(groups[0])[1]
    assert counts["reward/errors"] == 1
    assert time.monotonic() - started < 15  # found, not waited for


def test_rubbish_between_two_jobs_costs_nothing(file: str) -> None:
    with RewardPool(None, [f"{file}:scribbles_later"]) as pool:
        for number in range(3):
            one = group([str(number)])
            pool.judge([one])
            time.sleep(0.3)
            assert values(one) == [float(number)]


def test_rubbish_while_loading_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(SOURCE + "\nscribble('length')\n")
    with (
        RewardPool(None, [f"{tmp_path / 'loads.py'}:pids"]) as pool,
        pytest.raises(RunError, match=r"did not start: .*garbled"),
    ):
        pool.judge([group(["a"])])


def test_an_answer_that_stops_halfway_ends_at_the_time_limit(file: str) -> None:
    one = group(["1", "half"])
    with RewardPool(None, [f"{file}:stops_halfway"], timeout_s=1.0) as pool:
        pool.judge([one])
    assert values(one) == [1.0, None]
    assert "timed out after 1 s" in errors(one)[1]


def test_a_job_that_nobody_reads_ends_at_the_time_limit(file: str) -> None:
    with RewardPool(None, [f"{file}:pids"], timeout_s=1.0) as pool:
        first = group(["a"])
        pool.judge([first])
        os.kill(int(values(first)[0] or 0), signal.SIGSTOP)
        groups = [group(["a" * 10_000_000]), group(["b"])]
        counts = pool.judge(groups)
    assert values(groups[0]) == [None]
    assert values(groups[1])[0] not in (None, *values(first))
    assert counts["reward/timeouts"] == 1


def test_a_pool_is_of_the_process_that_made_it(file: str) -> None:
    with RewardPool(None, [f"{file}:pids"]) as pool:
        first = group(["a"])
        pool.judge([first])
        child = os.fork()
        if child == 0:
            try:
                pool.close()
                pool.judge([group(["a"])])
            except RunError as error:
                os._exit(0 if "process that made it" in str(error) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        second = group(["a"])
        pool.judge([second])
    assert values(first) == values(second)
