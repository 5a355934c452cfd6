"""How far a long job is and when it will end: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Self, TextIO, TypeVar

Item = TypeVar("Item")
PATIENCE = 2.0
"""Seconds that what comes before the first step may take without a word."""


class Progress:
    """Counts towards `total` on standard error. Use as a context manager.

        with Progress(300, "ppo", unit="step") as progress:
            ...
            progress.advance(1, {"reward": 0.41})

    On a terminal it is a live bar (rich); otherwise, and with TERM=dumb, plain lines: at most one every `every`
    seconds, and one at the end. NO_COLOR is respected. A terminal that goes away ends the display, never the job.

    Args:
        total: how many units there are; None when unknown (then there is no ETA).
        label: what is being done.
        unit: what is counted.
        done: units already done when it starts (a resumed run); they do not count for the speed.
        stream: where to write.
        every: seconds between plain lines.
        after: nothing is shown of a job that takes fewer seconds.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        *,
        unit: str = "step",
        done: int = 0,
        stream: TextIO | None = None,
        every: float = 5.0,
        after: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.unit, self.done = total, label, unit, done
        self._first = done
        self._stream = sys.stderr if stream is None else stream
        self._every, self._after, self._clock = every, after, clock
        self._started = self._last_line = clock()
        self._values: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None
        self._closed, self._told = False, -1

    def __enter__(self) -> Self:
        self._started = self._last_line = self._clock()
        if not self._after:
            self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, units: int = 1, values: Mapping[str, Any] | None = None) -> None:
        """`units` more are done; `values` are shown beside the count until the next ones come."""
        self.done += units
        if values:
            self._values = dict(values)
        if self._after:
            if self._clock() - self._started < self._after:
                return
            self._after = 0.0
            self._show()
            self._last_line = -math.inf
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, values=self._shown_values(), pace=self._pace())
        elif self._clock() - self._last_line >= self._every:
            self._print()

    def note(self, text: str) -> None:
        """Writes a line of its own without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._write(text)

    def close(self) -> None:
        """Shows the last state and ends the display; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):
                self._bar.stop()
            self._bar = None
        elif not self._after and self._told != self.done:
            self._print()

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the end at the mean speed so far; None while unknown."""
        fresh = self.done - self._first
        if self.total is None or fresh <= 0:
            return None
        return max(0, self.total - self.done) * (self._clock() - self._started) / fresh

    def _show(self) -> None:
        """Starts the bar, where there is a terminal."""
        try:
            if not self._stream.isatty() or os.environ.get("TERM") == "dumb":
                return
        except ValueError:  # closed
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
            TextColumn("{task.fields[values]}", markup=False),
            console=Console(file=self._stream, no_color=bool(os.environ.get("NO_COLOR"))),
        )
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, values="", pace="")
        self._bar.start()

    def _pace(self) -> str:
        elapsed, fresh = self._clock() - self._started, self.done - self._first
        parts = []
        if fresh > 0 and elapsed > 0:
            seconds = elapsed / fresh
            parts.append(f"{seconds:.1f} s/{self.unit}" if seconds >= 1 else f"{1 / seconds:.1f} {self.unit}s/s")
        eta = self.eta_seconds
        if eta is not None and not (self.total is not None and self.done >= self.total):
            parts.append(f"ETA {format_seconds(eta)}")
        return "  ".join(parts)

    def _shown_values(self) -> str:
        return "  ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in self._values.items())

    def _print(self) -> None:
        self._last_line, self._told = self._clock(), self.done
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        share = f"{100 * self.done // self.total}%" if self.total else ""
        elapsed = format_seconds(self._last_line - self._started)
        parts = [f"{self.label}: {count} {self.unit}s", share, elapsed, self._pace(), self._shown_values()]
        self._write("  ".join(part for part in parts if part))

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._every = float("inf")  # The reader has gone; the job goes on.


def counted(items: Iterable[Item], label: str, *, unit: str = "row") -> Iterator[Item]:
    """The items, and how many have been taken, shown where that takes longer than PATIENCE."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(total, label, unit=unit, after=PATIENCE) as progress:
        for item in items:
            yield item
            progress.advance()


@contextlib.contextmanager
def told(text: str) -> Iterator[None]:
    """Around what cannot be counted: says what it is on standard error where it takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, lambda: print(f"upslope: {text} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def format_seconds(seconds: float) -> str:
    """ "0:07", "12:34", "1:02:03"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
