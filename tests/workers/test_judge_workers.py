"""Rewards in killable processes: what hangs, dies or raises costs its own sample, and nothing outlives the pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reward_kit import alive, errors, gone, group, values

from upslope.errors import ConfigError, DataError, RunError
from upslope.rewards.judge import InlineJudge, WeightedSum
from upslope.tasks import load_task
from upslope.workers.rewards import RewardPool, make_scorer

SOURCE = """
import asyncio, os, signal, subprocess, sys, time

def number(text):
    if text == "hang":
        while True: pass
    if text == "sleep": time.sleep(60)
    if text == "exit": os._exit(3)
    if text == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "raise": raise RuntimeError("bad day")
    if text == "torch": return float("torch" in sys.modules)
    if text == "pid": return float(os.getpid())
    if text == "hash": return float(9**9**7 % 7)
    if text == "child":
        child = subprocess.Popen(["sleep", "600"])
        open(os.environ["CHILD_FILE"], "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
    if text == "signal": return float(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    return float("nan") if text == "nan" else float(len(text))

def fn(prompts, completions):
    print("printing must not upset anything")
    return [number(text) for text in completions]

async def later(prompts, completions):
    (text,) = completions
    if text == "never": await asyncio.sleep(600)
    if text == "block": time.sleep(600)
    await asyncio.sleep(0.2)
    return [1.0]

def short(prompts, completions):
    return [1.0] * (len(completions) - 1)

def whole(prompts, completions):
    if "exit" in completions: os._exit(1)
    if "raise" in completions: raise ValueError("no")
    return [float(len(completions))] * len(completions)
whole.whole_group = True

def keyed(prompts, completions):
    time.sleep(0.05 if prompts[0].key % 3 == 0 else 0)
    return [prompts[0].key * 100 + float(text) for text in completions]
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(SOURCE)
    return str(tmp_path / "rewards.py")


def test_only_the_guilty_samples_are_errors(file: str) -> None:
    groups = [
        group(["a", "hang", "ccc"]),
        group(["exit", "b"]),
        group(["raise", "nan", "x"]),
        group(["yy", "segfault"]),
    ]
    with RewardPool(None, [f"{file}:fn"], processes=2, timeout_s=0.7) as pool:
        counts = pool.judge(groups)
        again = group(["ab"])
        pool.judge([again])
    assert [values(one) for one in groups] == [[1.0, None, 3.0], [None, 1.0], [None, None, 1.0], [2.0, None]]
    assert values(again) == [2.0]
    assert "timed out after 0.7 s" in errors(groups[0])[1]
    assert "exit code 3" in errors(groups[1])[0]
    assert "RuntimeError: bad day (rewards.py:10)" in errors(groups[2])[0]
    assert "nan" in errors(groups[2])[1]
    assert "signal 11" in errors(groups[3])[1]
    assert (counts["reward/errors"], counts["reward/timeouts"]) == (5.0, 1.0)
    assert counts["reward/seconds"] > 1.0


def test_order_and_inline_agree_whatever_arrives_first(file: str) -> None:
    groups = [group([str(i) for i in range(4)], key=key) for key in range(12)]
    inline = [group([str(i) for i in range(4)], key=key) for key in range(12)]
    with RewardPool(None, [f"{file}:keyed"], processes=3) as pool:
        pool.judge(groups)
    InlineJudge(WeightedSum(None, [f"{file}:keyed"])).judge(inline)
    assert [values(one) for one in groups] == [values(one) for one in inline]
    assert values(groups[7]) == [700.0, 701.0, 702.0, 703.0]


def test_workers_are_bare_and_deaf_to_ctrl_c(file: str) -> None:
    import torch  # noqa: F401  (the main program has torch; its workers must not)

    one = group(["torch", "signal"])
    with RewardPool(None, [f"{file}:fn"]) as pool:
        pool.judge([one])
    assert values(one) == [0.0, 1.0]


def test_async_times_out_alone_and_together(file: str) -> None:
    one = group(["a", "never", "b", "c"])
    start = time.monotonic()
    with RewardPool(None, [f"{file}:later"], timeout_s=1.5) as pool:
        counts = pool.judge([one])
    assert values(one) == [1.0, None, 1.0, 1.0]
    assert "timed out" in errors(one)[1]
    assert counts["reward/timeouts"] == 1
    assert time.monotonic() - start < 10


def test_async_that_blocks_is_killed(file: str) -> None:
    one = group(["block", "b"])
    with RewardPool(None, [f"{file}:later"], timeout_s=0.6) as pool:
        pool.judge([one])
    assert values(one) == [None, 1.0]


def test_wrong_count_stops_and_the_pool_lives_on(file: str) -> None:
    with RewardPool(None, [f"{file}:short"]) as pool:
        for _ in range(2):
            with pytest.raises(DataError, match="reward 'short' returned 1 judgements for 2 completions"):
                pool.judge([group(["a", "b"])])


def test_a_reward_of_the_whole_group_is_never_split(file: str) -> None:
    groups = [group(["a", "b", "c"]), group(["a", "exit"]), group(["raise", "b"])]
    with RewardPool(None, [f"{file}:whole"]) as pool:
        counts = pool.judge(groups)
    assert [values(one) for one in groups] == [[3.0] * 3, [None] * 2, [None] * 2]
    assert counts["reward/errors"] == 4


def test_nothing_judged_stops(file: str) -> None:
    with RewardPool(None, [f"{file}:fn"]) as pool, pytest.raises(DataError, match=r"any of 2 completions.*bad day"):
        pool.judge([group(["raise", "raise"])])


@pytest.mark.parametrize(
    ("task", "reward", "needle"),
    [
        ("chain_sun", None, "did you mean 'chain_sum'"),
        (None, "{file}:fnn", "did you mean 'fn'"),
        (None, "nowhere.py:fn", "no such file"),
        (None, None, "no task is given"),
    ],
)
def test_what_cannot_be_loaded_is_said_by_the_first_judge(
    file: str, task: str | None, reward: str | None, needle: str
) -> None:
    rewards = [reward.format(file=file)] if reward else []
    with RewardPool(task, rewards) as pool:
        for _ in range(2):
            with pytest.raises(ConfigError, match=needle):
                pool.judge([group(["a"])])


def test_a_worker_that_dies_while_loading_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    with RewardPool(None, [f"{tmp_path / 'dies.py'}:fn"]) as pool, pytest.raises(RunError, match="exit code 7"):
        pool.judge([group(["a"])])


def test_a_worker_killed_between_steps_costs_nothing(file: str) -> None:
    with RewardPool(None, [f"{file}:fn"]) as pool:
        first = group(["pid"])
        pool.judge([first])
        os.kill(int(values(first)[0] or 0), signal.SIGKILL)
        time.sleep(0.2)
        second = group(["ab"])
        assert pool.judge([second])["reward/errors"] == 0
        assert values(second) == [2.0]


def test_metadata_that_cannot_be_sent_is_named(file: str) -> None:
    with RewardPool(None, [f"{file}:fn"]) as pool, pytest.raises(DataError, match="prompt 5 cannot be sent"):
        pool.judge([group(["a"], key=5, function=lambda: 0)])


def test_limits_are_checked_and_closing_is_final(file: str) -> None:
    with pytest.raises(ConfigError, match="at least 1 process"):
        RewardPool(None, [f"{file}:fn"], processes=0)
    with pytest.raises(ConfigError, match="must be positive"):
        RewardPool(None, [f"{file}:fn"], timeout_s=0.0)
    pool = RewardPool(None, [f"{file}:fn"])
    assert pool.judge([]) == {"reward/errors": 0.0, "reward/timeouts": 0.0, "reward/seconds": pytest.approx(0, abs=1)}
    pool.close()
    pool.close()
    with pytest.raises(RunError, match="closed"):
        pool.judge([])


def test_make_scorer_stays_inline_only_where_that_is_safe(file: str) -> None:
    sums = "chain_sum:min_terms=2,max_terms=2"
    for task, rewards, processes, inline in [
        (sums, (), 0, True),
        (load_task(sums), ("task", "length:target=3"), 0, True),
        (sums, (), 2, False),
        ("countdown", (), 0, True),
        ("simple_integration", (), 0, False),
        (sums, (f"{file}:fn",), 0, False),
        (sums, ("format:pattern='a'",), 0, False),
    ]:
        with make_scorer(task, rewards, processes=processes) as scorer:
            assert isinstance(scorer, InlineJudge) is inline


def test_a_task_with_its_own_verifier_through_the_pool() -> None:
    task = load_task("simple_integration")
    prompts = task.prompts("train", 3, seed=0)
    groups = [group([str(prompt.answer), "9**9**9**9", "x+"]) for prompt in prompts]
    for one, prompt in zip(groups, prompts, strict=True):
        one.prompt = prompt
    with make_scorer(task, processes=2) as scorer:
        scorer.judge(groups)
    assert [values(one) for one in groups] == [[1.0, 0.0, 0.0]] * 3


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
sys.path.insert(0, sys.argv[1])
from upslope.workers.rewards import RewardPool
from upslope.types import Prompt, Rollout, RolloutGroup
pool = RewardPool(None, [sys.argv[2] + ":fn"], processes=2, timeout_s=60)
def ask(*texts):
    rollouts = [Rollout([1], [2], [True], [0.0], [0.0], "stop", t, i) for i, t in enumerate(texts)]
    one = RolloutGroup(Prompt(0, text="q"), rollouts)
    pool.judge([one])
    return one
print(int(ask("pid").rollouts[0].reward.value), *(w.process.pid for w in pool._workers), flush=True)
ask(sys.argv[3])
"""


@pytest.fixture
def program(root: Path, file: str, tmp_path: Path) -> Iterator:
    started: list[subprocess.Popen[str]] = []

    def start(text: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(root / "src"), file, text],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CHILD_FILE": str(tmp_path / "child")},
        )
        started.append(process)
        assert process.stdout is not None
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("text", ["hang", "hash"])
def test_workers_die_with_a_killed_parent_even_while_busy(program, text: str) -> None:
    process, pids = program(text)
    time.sleep(0.5)
    assert all(alive(pid) for pid in pids)
    process.kill()
    assert gone(*pids)


def test_what_a_reward_started_dies_too(program, tmp_path: Path) -> None:
    process, _ = program("child")
    deadline = time.monotonic() + 10
    while not (tmp_path / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    pids = [int(pid) for pid in (tmp_path / "child").read_text().split()]
    process.kill()
    assert gone(*pids)


def test_ctrl_c_shows_no_workers_traceback_and_leaves_nothing(program) -> None:
    process, pids = program("sleep")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=10)
    assert shown.count("Traceback") == 1
    assert "KeyboardInterrupt" in shown
    assert "in serve" not in shown
    assert gone(*pids)


def test_closing_kills_a_child_of_a_hanging_reward(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    one = group(["child", "a"])
    with RewardPool(None, [f"{file}:fn"], timeout_s=1.0) as pool:
        pool.judge([one])
        assert gone(*map(int, (tmp_path / "child").read_text().split()))
    assert values(one) == [None, 1.0]
