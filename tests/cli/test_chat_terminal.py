"""`upslope chat` on a terminal of its own: Ctrl-C, line editing, history, colours."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from letters_model import letters_folder

from upslope.cache import cache_root
from upslope.commands.chat import Screen
from upslope.commands.chat_session import ChatSession
from upslope.data.records import read_records
from upslope.options import ChatOptions

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
DEADLINE = 60.0


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a long context, whose greedy replies have no end."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    return str(letters_folder(folder, ends=False, max_position_embeddings=60_000))


class Terminal:
    """A child on a pseudo-terminal; `seen` is what it printed, without escape sequences."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self.descriptor, self.raw = pid, descriptor, ""

    @property
    def seen(self) -> str:
        return ANSI.sub("", self.raw)

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait_for(self, pattern: str, start: int = 0) -> int:
        """Read until `pattern` is seen after `start`; where it ends. Fails when the child ends or time is up."""
        until = time.monotonic() + DEADLINE
        while not (found := re.compile(pattern).search(self.seen, start)):
            assert time.monotonic() < until, f"never saw {pattern!r} in {self.seen[start:]!r}"
            assert self._read(until), f"ended without {pattern!r}: {self.seen[start:]!r}"
        return found.end()

    def interrupt(self, pattern: str, start: int = 0) -> int:
        """Ctrl-C, and again while `pattern` stays away: Python's prompt forgets one that comes as it begins to wait."""
        for _ in range(int(DEADLINE / 5)):
            self.type("\x03")
            if self._ready(time.monotonic() + 5):
                return self.wait_for(pattern, start)
        raise AssertionError(f"no Ctrl-C was answered after {self.seen[start:]!r}")

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read(time.monotonic() + DEADLINE):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _ready(self, until: float) -> bool:
        ready, _, _ = select.select([self.descriptor], [], [], max(0.0, until - time.monotonic()))
        return bool(ready)

    def _read(self, until: float) -> bool:
        assert self._ready(until), f"nothing more came after {self.seen[-500:]!r}"
        try:
            data = os.read(self.descriptor, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


@contextmanager
def chat(model: str, home: Path, *options: str) -> Iterator[Terminal]:
    """The verb on a new terminal, with a cache of its own but the compiled kernels of everyone."""
    kernels = cache_root() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    home.mkdir(exist_ok=True)
    (home / "kernels").symlink_to(kernels)
    pid, descriptor = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job is born deaf to it
        os.environ |= {"UPSLOPE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        os.environ |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "upslope", "chat", model, "--dtype", "float32", "--temperature", "0"]
        os.execv(sys.executable, [*command, *options])
    terminal = Terminal(pid, descriptor)
    try:
        yield terminal
    finally:
        if terminal.pid:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        os.close(descriptor)


def test_a_conversation_with_ctrl_c(endless: str, tmp_path: Path) -> None:
    """Ctrl-C stops a reply and keeps what came; at the prompt it changes nothing; mistakes do not end the chat."""
    saved, history = tmp_path / "saved.jsonl", tmp_path / "home" / "chat_history"
    history.parent.mkdir()
    history.write_text("What I said yesterday.\n")
    history.chmod(0o600)
    with chat(endless, tmp_path / "home", "--max-tokens", "50000") as terminal:
        at = terminal.wait_for("60000 tokens of context.*\n> ")
        terminal.type("\x1b[A")  # the arrow up
        at = terminal.wait_for(r"What I said yesterday\.", at)
        terminal.type("\x15Hello.\n")  # that line away
        at = terminal.wait_for(r"Hello\.\n(.|\n){20}", at)
        terminal.type("\x03")
        at = terminal.wait_for(r"stopped; what came is kept\n.*tokens in .*\n> ", at)
        terminal.type("/unknwn\n")
        at = terminal.wait_for(r"error: no command /unknwn(.|\n)*\n> ", at)
        terminal.type("half a line")
        at = terminal.wait_for("half a line", at)
        at = terminal.interrupt(r"Ctrl-D or /exit ends\n> ", at)
        terminal.type(f"/save {saved}\n")
        at = terminal.wait_for(r"2 messages\n> ", at)
        terminal.type("/set max_tokens 5\n")
        at = terminal.wait_for(r"max_tokens 5\n> ", at)
        terminal.type("/edit\n")  # the last turn, ready to be changed
        at = terminal.wait_for(r"> Hello\.", at)
        terminal.type("\x7f!\n")
        at = terminal.wait_for(r"cut off by max_tokens = 5(.|\n)*\n> ", at)
        terminal.type("/tokens\n")
        at = terminal.wait_for(r"5 tokens, log-prob(.|\n)*\n> ", at)
        terminal.type("/undo\n")
        at = terminal.wait_for(r"taken back: Hello!\n> ", at)
        assert history.read_text().splitlines()[:3] == ["What I said yesterday.", "Hello.", "/unknwn"]
        terminal.type("\x04")
        assert terminal.end() == 0
    question, partial = read_records(saved)[0].messages
    assert question.content == "Hello."
    assert partial.content
    session = ChatSession(
        ChatOptions(model=endless, dtype="float32", temperature=0.0, max_tokens=len(partial.content) + 9)
    )
    whole = session.say("Hello.", lambda piece: None, lambda: False).completion.text
    assert whole.startswith(partial.content)
    assert history.read_text().splitlines()[-2:] == ["/tokens", "/undo"]


def test_a_new_history_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", Display())
    monkeypatch.setattr(sys, "stdout", Display())
    try:
        history = Screen(("help",)).history
    finally:
        readline.clear_history()
        readline.set_completer(None)
    assert history == tmp_path / "home" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


class Display(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_but_with_no_color(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display()
    monkeypatch.setattr(sys, "stderr", display)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(())
    screen.token(0.7, "good", [(0.2, "bad")])
    screen.note("[bold]as it stands[/bold] :smile: \x1b[31m")
    assert ANSI.sub("", display.getvalue()).splitlines() == [
        "  70.0%  'good'             20.0% 'bad'",
        "[bold]as it stands[/bold] :smile: \u241b[31m",
    ]
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", display.getvalue())) is not no_color
