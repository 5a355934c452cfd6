"""Where a chat is read from and written to: a terminal with line editing and history, or pipes."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from upslope.cache import cache_root
from upslope.commands.decoding import shown
from upslope.errors import DataError

HISTORY_LENGTH = 1000
_COLOURS = ((0.5, "green"), (0.1, "yellow"), (0.0, "red"))


class Screen:
    """Replies go to standard output, everything else to standard error, in colour on a terminal without NO_COLOR.

    `interactive`: somebody types. Then lines are edited, and remembered in `history` (in the cache, readable by the
    user alone).
    """

    def __init__(self, commands: Iterable[str]) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.history = cache_root() / "chat_history"
        self._console: Any = None
        self._readline: Any = None
        self._unended = False
        if sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, no_color=bool(os.environ.get("NO_COLOR")), soft_wrap=True)
        if self.interactive:
            self._start_readline([f"/{name}" for name in commands])

    def read(self, start: str = "") -> str:
        """The next input, `start` already typed; lines that end with a backslash go on; empty after Ctrl-C.

        Raises EOFError at the end.
        """
        try:
            lines = [self._line("> ", start)]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(self._line(". ", ""))
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.note("\nCtrl-D or /exit ends")
            return ""
        text = "\n".join(lines)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("standard input: not UTF-8; convert it")
        if self._readline is not None and text.strip():
            with self._remembering():  # at once, so that it outlives a kill
                self._readline.append_history_file(len(lines), self.history)
        return text

    def revise(self, text: str) -> str:
        """`text` as the user changes it; empty where nobody types."""
        return self.read(text) if self.interactive else ""

    def write(self, piece: str) -> None:
        """A piece of a reply."""
        sys.stdout.write(shown(piece, sys.stdout))
        sys.stdout.flush()
        self._unended = True

    def end_reply(self) -> None:
        """A reply, or what came of it, ends with a line break; in a pipe an empty one is an empty line."""
        if self._unended or not self.interactive:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._unended = False

    def note(self, text: str, style: str = "dim") -> None:
        """A line that is no reply."""
        if self._console is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._console.print(shown(text, sys.stderr), style=style, markup=False, highlight=False, emoji=False)

    def token(self, probability: float, text: str, others: list[tuple[float, str]]) -> None:
        """A token with its probability and those of its alternatives."""
        rest = "   ".join(f"{p:.1%} {other!r}" for p, other in others)
        colour = next(colour for least, colour in _COLOURS if probability >= least)
        self.note(f"{probability:7.1%}  {text!r:<18} {rest}".rstrip(), colour)

    def _line(self, prompt: str, start: str) -> str:
        if not self.interactive:
            try:
                line = sys.stdin.readline()
            except UnicodeDecodeError:
                raise DataError("standard input: not UTF-8; convert it") from None
            if not line:
                raise EOFError
            return line.rstrip("\r\n")
        if self._readline is None:
            return input(prompt)
        try:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(start))
            return input(prompt)
        finally:
            self._readline.set_startup_hook(None)

    def _start_readline(self, commands: list[str]) -> None:
        try:
            import readline
        except ImportError:  # a Python built without it: lines are not edited
            return
        self._readline = readline
        readline.set_auto_history(True)
        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, i: dict(enumerate(c for c in commands if c.startswith(text))).get(i))
        readline.parse_and_bind("tab: complete")
        with self._remembering():
            self.history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.history, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            readline.read_history_file(self.history)
            readline.set_history_length(HISTORY_LENGTH)
            readline.write_history_file(self.history)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.note(f"{self.history}: no history is kept: {error.strerror}")
            self.history = Path(os.devnull)


@contextmanager
def stop_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed. A second Ctrl-C interrupts as ever.

    A step of the engine is never cut in two by it.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
