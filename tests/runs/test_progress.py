from __future__ import annotations

import io
import sys
import time

import pytest

from upslope.runs import progress as progress_module
from upslope.runs.progress import Progress, counted, format_seconds, told


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(total: int | None, *, seconds_per_step: float, steps: int, **options: int) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with Progress(total, "ppo", stream=stream, clock=clock, every=5.0, **options) as progress:
        for step in range(steps):
            clock.now += seconds_per_step
            progress.advance(1, {"reward": step / 3})
    return stream.getvalue().splitlines()


def test_plain_lines_are_rare_and_the_last_one_always_comes() -> None:
    lines = run(100, seconds_per_step=1.0, steps=12)
    assert len(lines) == 3
    assert lines[0] == "ppo: 5/100 steps  5%  0:05  1.0 s/step  ETA 1:35  reward=1.333"
    assert lines[-1].startswith("ppo: 12/100 steps  12%  0:12")
    assert len(run(1000, seconds_per_step=0.01, steps=100)) == 1


def test_a_finished_job_has_no_eta_and_unknown_totals_work() -> None:
    assert "ETA" not in run(3, seconds_per_step=1.0, steps=3)[-1]
    assert run(None, seconds_per_step=0.25, steps=4)[-1] == "ppo: 4 steps  0:01  4.0 steps/s  reward=1"
    assert run(0, seconds_per_step=1.0, steps=0) == ["ppo: 0/0 steps  0:00"]


def test_a_resumed_job_measures_only_its_own_speed() -> None:
    assert "1.0 s/step  ETA 0:45" in run(100, seconds_per_step=1.0, steps=5, done=50)[0]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = Terminal()
    with Progress(4, "[ppo]", stream=coloured) as progress:
        progress.advance(4, {"reward": 0.5})
        progress.note("saved [step 4]")
    text = coloured.getvalue()
    assert "4/4" in text
    assert "reward=0.5" in text
    assert "saved [step 4]" in text
    assert "[ppo]" in text
    assert "\x1b[38;5;" in text or "\x1b[3" in text
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    with Progress(4, "ppo", stream=plain) as progress:
        progress.advance(4)
    assert "4/4" in plain.getvalue()
    assert "\x1b[38;5;" not in plain.getvalue()
    assert "\x1b[3" not in plain.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(1, "ppo", stream=stream) as progress:
        progress.note("a note")
        progress.advance()
    assert stream.getvalue().splitlines()[0] == "a note"
    assert "\x1b" not in stream.getvalue()


def test_a_reader_that_goes_away_does_not_end_the_job() -> None:
    stream = io.StringIO()
    stream.close()
    with Progress(2, "ppo", stream=stream, every=0.0) as progress:
        progress.advance(2)
    assert progress.done == 2


def test_it_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "ppo") as progress:
        progress.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ppo: 1/1")
    assert sys.stderr is not None


@pytest.mark.parametrize(("seconds", "text"), [(7.2, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_times(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_takes_less_than_it_may_is_not_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for steps, shown in ((3, False), (5, True)):
        clock, stream = Clock(), Terminal() if terminal else io.StringIO()
        with Progress(9, "encoding", unit="row", stream=stream, clock=clock, after=2.0) as progress:
            for _ in range(steps):
                clock.now += 0.5
                progress.advance()
        assert ("encoding" in stream.getvalue()) == shown
        if shown and not terminal:
            first, last = stream.getvalue().splitlines()
            assert first.startswith("encoding: 4/9 rows  44%  0:02")
            assert last.startswith("encoding: 5/9 rows")


def test_counted_gives_the_items_and_told_speaks_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted("abc", "letters")) == ["a", "b", "c"]
    with told("nothing"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_module, "PATIENCE", 0.01)
    assert [time.sleep(0.02) or x for x in counted(iter("ab"), "letters", unit="letter")] == ["a", "b"]
    with told("loading"):
        time.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("letters: 1 letters")
    assert said[-1] == "upslope: loading ..."
