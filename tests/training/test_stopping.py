from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError
from upslope.training.stopping import Budget, GracefulInterrupt, Patience, StopWhen


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_each_budget_ends_a_run_with_its_reason() -> None:
    clock = Clock(50.0)
    for budget, reason in [
        (Budget(max_steps=3), "max_steps: 3 of 3 steps done"),
        (Budget(max_tokens=250), "max_tokens: 300 of 250 tokens used"),
        (Budget(max_seconds=25.0), "max_seconds: 30 of 25 seconds used"),
    ]:
        stop = StopWhen(budget, clock=clock)
        for _ in range(3):
            assert stop.reason is None
            clock.now += 10.0
            stop.after_step(tokens=100)
        assert stop.reason == reason
    assert StopWhen(Budget(max_steps=0)).reason is not None
    assert StopWhen(Budget()).reason is None
    for bad in ({"max_steps": -1}, {"max_seconds": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Budget(**bad)  # type: ignore[arg-type]


def test_evaluations_cost_no_seconds() -> None:
    clock = Clock()
    stop = StopWhen(Budget(max_seconds=10.0), clock=clock)
    clock.now += 4.0
    with stop.paused():
        clock.now += 100.0
    clock.now += 5.0
    assert stop.seconds == 9.0
    assert stop.reason is None
    with contextlib.suppress(KeyError), stop.paused():
        clock.now += 100.0
        raise KeyError
    assert stop.seconds == 9.0, "a failed evaluation costs nothing either"


def test_patience_counts_evaluations_without_improvement() -> None:
    patience = Patience(2)
    assert [patience.update(value) for value in (0.5, 0.55, 0.65, 0.6, math.nan)] == [True, True, True, False, False]
    assert patience.exhausted
    assert patience.best == 0.65
    lower = Patience(1, mode="min")
    assert [lower.update(value) for value in (2.0, 1.0, 1.0)] == [True, True, False]
    assert lower.exhausted
    assert lower.best == 1.0
    first = Patience(1)
    assert not first.update(math.nan)
    assert first.exhausted
    assert first.best is None
    forever = Patience(None)
    assert [forever.update(0.0) for _ in range(99)] == [True] + [False] * 98
    assert not forever.exhausted
    for options in ({"patience": 0}, {"patience": 1, "mode": "up"}):
        with pytest.raises(ConfigError):
            Patience(**options)  # type: ignore[arg-type]


def test_targets_in_both_directions() -> None:
    stop = StopWhen(Budget(), target=0.9)
    assert stop.after_evaluation(0.8)
    assert stop.reason is None
    assert not stop.after_evaluation(math.nan)
    assert stop.reason is None
    assert stop.after_evaluation(0.9)
    assert stop.reason == "target: 0.9 reached 0.9"
    down = StopWhen(Budget(), Patience(None, mode="min"), 1.5)
    down.after_evaluation(2.0)
    assert down.reason is None
    assert down.after_evaluation(1.0)
    assert down.reason == "target: 1 reached 1.5"


def test_patience_ends_a_run_with_its_reason() -> None:
    stop = StopWhen(Budget(max_steps=9), Patience(2))
    for value in (0.5, 0.4, 0.3):
        assert stop.reason is None
        stop.after_evaluation(value)
    assert stop.reason == "patience: no improvement on 0.5 in 2 evaluations"


def test_new_limits_count_after_a_resume() -> None:
    stop = StopWhen(Budget(max_steps=2), Patience(1))
    stop.after_step(tokens=5)
    stop.after_step(tokens=5)
    stop.after_evaluation(0.5)
    stop.after_evaluation(0.4)
    more = StopWhen(Budget(max_steps=3), Patience(3))
    more.load_state_dict(stop.state_dict())
    assert more.reason is None
    assert more.steps == 2
    assert more.tokens == 10
    same = StopWhen(Budget(max_steps=3), Patience(1))
    same.load_state_dict(stop.state_dict())
    assert (same.reason or "").startswith("patience")
    met = StopWhen(Budget(), Patience(9), 0.5)
    met.load_state_dict(stop.state_dict())
    assert (met.reason or "").startswith("target")


events = st.lists(st.one_of(st.integers(0, 50), st.floats(0, 1, width=16)), max_size=30)


@given(events, st.integers(0, 30))
def test_a_run_resumed_anywhere_stops_where_the_other_does(plan: list[int | float], cut: int) -> None:
    def make(clock: Clock) -> StopWhen:
        budget = Budget(max_steps=12, max_tokens=300, max_seconds=200.0)
        return StopWhen(budget, Patience(4), 0.99, clock=clock)

    def feed(stop: StopWhen, clock: Clock, part: list[int | float]) -> list[object]:
        seen: list[object] = []
        for event in part:
            clock.now += 7.0
            seen.append(stop.after_step(tokens=event) if isinstance(event, int) else stop.after_evaluation(event))
            seen.append(stop.reason is None)
        return seen

    clock = Clock()
    straight = make(clock)
    expected = feed(straight, clock, plan)
    clock = Clock()
    first = make(clock)
    got = feed(first, clock, plan[:cut])
    state = json.loads(json.dumps(first.state_dict()))
    clock = Clock(12345.0)
    second = make(clock)
    second.load_state_dict(state)
    got += feed(second, clock, plan[cut:])
    # A reason may end with the launch (a target met, then missed): only what is still true is carried over.
    if all(expected[1::2]):
        assert got == expected
    assert second.state_dict() == straight.state_dict()


LOOP = """
import sys, time
from upslope.training.stopping import GracefulInterrupt
with GracefulInterrupt() as interrupt:
    print("ready", flush=True)
    for step in range(100):
        for _ in range(20):
            time.sleep(0.01)
        print("step", step, flush=True)
        if interrupt.requested and "stubborn" not in sys.argv:
            print("saved", flush=True)
            raise SystemExit(interrupt.exit_code)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_and_saves(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    steps = out.splitlines()
    assert steps.pop() == "saved"
    assert 1 <= len(steps) < 50
    assert f"{number.name}: finishing this step, then saving" in err


def test_the_second_signal_stops_at_once() -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == "\n"
    assert "SIGINT" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10.0  # The loop would take 20.
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err
    assert "saved" not in out


def test_the_old_handlers_come_back_and_threads_are_spared() -> None:
    before = signal.getsignal(signal.SIGINT)
    with GracefulInterrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) != before
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGINT) is before
    results: list[bool] = []

    def work() -> None:
        with GracefulInterrupt() as inner:
            results.append(inner.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]
