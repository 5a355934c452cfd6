"""`upslope chat`: talk to a model in the terminal, or through a pipe."""

import difflib
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from upslope.cache import cache_root
from upslope.commands.chat_session import SETTINGS, ChatSession, Reply, Show, Stopped
from upslope.commands.generate import shown
from upslope.data.records import read_records
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.options import ChatOptions
from upslope.runs.lines import MetricLines

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
        print(shown(piece, sys.stdout), end="", flush=True)
        self._unended = True

    def end_reply(self) -> None:
        """A reply, or what came of it, ends with a line break; in a pipe an empty one is an empty line."""
        if self._unended or not self.interactive:
            print(flush=True)
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


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and the screen that it is shown on; what its commands do is in COMMANDS."""

    session: ChatSession
    screen: Screen

    def take(self, text: str) -> None:
        """A turn, or a command; nothing for a blank line."""
        if text.startswith("/") and not text.startswith("//"):
            self._perform(text)
        elif text.strip():
            self.respond(partial(self.session.say, text.removeprefix("/")))

    def respond(self, draw: Callable[[Show, Stopped], Reply]) -> None:
        """Show the reply that `draw(show, stopped)` draws while it comes, then what there is to say about it."""
        try:
            with stop_on_ctrl_c() if self.screen.interactive else nullcontext(lambda: False) as stopped:
                reply = draw(self.screen.write, stopped)
        except UpslopeError:
            if self.screen.interactive:
                self.screen.end_reply()
            raise
        self.screen.end_reply()
        for line in self._remarks(reply):
            self.screen.note(line)

    def _perform(self, line: str) -> None:
        """The command of a line such as "/set top_k 40". Raises ConfigError for an unknown one; EOFError on /exit."""
        name, _, argument = line.removeprefix("/").partition(" ")
        command, argument = COMMANDS.get(name), argument.strip()
        if command is None:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean /{near[0]}?" if near else "."
            names = " ".join(f"/{known}" for known in COMMANDS)
            raise ConfigError(
                f"no command /{name}{hint} There are: {names} (to say a text that begins with /, write //)"
            )
        if argument and not command.usage:
            raise ConfigError(f"/{name} takes nothing after it, got {argument!r}")
        command.run(self, argument)

    def _remarks(self, reply: Reply) -> Iterator[str]:
        completion = reply.completion
        if completion.finish_reason == "cancelled":
            yield "stopped; what came is kept" if completion.text else "stopped before anything came"
        elif completion.finish_reason == "length" and reply.limit < self.session.options.max_tokens:
            yield f"cut off: the context of {self.session.context} tokens is full; /undo or /new makes room"
        elif completion.finish_reason == "length":
            yield f"cut off by max_tokens = {reply.limit}; /set max_tokens N, then /retry"
        elif not completion.text:
            yield "an empty reply"
        if self.screen.interactive:
            cost = f"{len(completion.tokens)} tokens in {reply.seconds:.1f} s"
            yield f"{cost}; prompt: {reply.prompt_tokens} tokens, {reply.cached_tokens} of them from the cache"

    def _new(self, argument: str) -> None:
        self.session.start()
        self.screen.note("a new conversation")

    def _system(self, argument: str) -> None:
        before, self.session.system = self.session.system, argument or None
        gone = "there was no system turn" if before is None else f"the system turn is gone; it was: {before}"
        self.screen.note("the system turn is set, from the next reply on" if argument else gone)

    def _set(self, argument: str) -> None:
        try:
            name, *words = shlex.split(argument) or [""]
        except ValueError as error:
            raise ConfigError(f"/set: {error}") from None
        if name:
            self.session.set(name, words)
        for key in [name.replace("-", "_")] if name else SETTINGS:
            value = getattr(self.session.options, key)
            self.screen.note(f"{key} {shlex.join(value) if isinstance(value, tuple) else value}")

    def _edit(self, argument: str) -> None:
        text = argument or self.screen.revise(self.session.last_user_text())
        if not text.strip():
            raise ConfigError("/edit wants the text that replaces your last turn")
        self.respond(partial(self.session.edit, text))

    def _save(self, argument: str) -> None:
        if not argument.lower().endswith(".jsonl"):
            raise ConfigError("/save wants the name of a .jsonl file, to which the conversation is added as a row")
        row = self.session.row
        with closing(MetricLines(Path(argument).expanduser())) as lines:
            lines.append(row)
            lines.flush()
        self.screen.note(f"added to {argument}: {len(row['messages'])} messages")

    def _load(self, argument: str) -> None:
        if not argument:
            raise ConfigError("/load wants the name of a file of conversations, whose last one it takes")
        records = read_records(argument)
        self.session.load(records[-1])
        self.screen.note(f"conversation {len(records)} of {len(records)} in {argument}")
        for message in self.session.messages:
            self.screen.note(f"{message.role}: {message.content}")
        if self.session.waiting:
            self.screen.note("its last turn has no reply yet: /retry draws it")

    def _tokens(self, argument: str) -> None:
        reply = self.session.last
        if reply is None:
            raise DataError("no reply was drawn yet in this conversation")
        completion, decode = reply.completion, self.session.tokenizer.decode
        tops = completion.top_logprobs or [{} for _ in completion.tokens]
        for token, logprob, alternatives in zip(completion.tokens, completion.policy_logprobs, tops, strict=True):
            others = [(math.exp(x), decode([i])) for i, x in alternatives.items() if i != token]
            self.screen.token(math.exp(logprob), decode([token]), others)
        total = math.fsum(completion.policy_logprobs)
        temperature = self.session.options.temperature or 1.0
        self.screen.note(f"{len(completion.tokens)} tokens, log-prob {total:.3f} at temperature {temperature:g}")

    def _model(self, argument: str) -> None:
        if argument:
            self.session.open(argument)
            argument = f"{argument} goes on with the conversation; its context holds {self.session.context} tokens"
        self.screen.note(argument or self.session.options.model)

    def _help(self, argument: str) -> None:
        heads = [f"/{name} {command.usage}".rstrip() for name, command in COMMANDS.items()]
        for head, command in zip(heads, COMMANDS.values(), strict=True):
            self.screen.note(f"{head:<{max(map(len, heads))}}  {command.summary}")
        self.screen.note("A line that ends with \\ goes on in the next; a text that begins with / is written with //.")

    def _exit(self, argument: str) -> None:
        raise EOFError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what may follow its name, what it does, and the function that does it."""

    usage: str
    summary: str
    run: Callable[[Chat, str], None]


COMMANDS: dict[str, Command] = {
    "new": Command("", "begin again; the system turn stays", Chat._new),
    "system": Command("[TEXT]", "set the system turn; without TEXT take it away", Chat._system),
    "set": Command("[KEY VALUE]", f"how replies are drawn: {' '.join(SETTINGS)}", Chat._set),
    "retry": Command("", "draw the last reply again", lambda chat, _: chat.respond(chat.session.retry)),
    "undo": Command(
        "",
        "take back your last turn and its reply",
        lambda chat, _: chat.screen.note(f"taken back: {chat.session.undo()}"),
    ),
    "edit": Command("[TEXT]", "say your last turn differently", Chat._edit),
    "save": Command("FILE", "add the conversation to a .jsonl file, as a row that upslope sft reads", Chat._save),
    "load": Command("FILE", "go on with the last conversation of a file", Chat._load),
    "tokens": Command("", "the last reply's tokens with their probabilities and alternatives", Chat._tokens),
    "model": Command("[SOURCE]", "go on with another model", Chat._model),
    "help": Command("", "this list", Chat._help),
    "exit": Command("", "end; Ctrl-D does, too", Chat._exit),
}


def run(options: ChatOptions) -> int:
    """Read turns and commands until the end of the input.

    Where nobody types, the first mistake is raised; on a terminal it is shown and the conversation goes on.
    """
    screen = Screen(COMMANDS)
    chat = Chat(ChatSession(options), screen)
    if screen.interactive:
        held = f"{options.model}: {chat.session.context} tokens of context"
        screen.note(f"{held}. /help, Ctrl-C stops a reply, Ctrl-D ends.")
    while True:
        try:
            chat.take(screen.read())
        except EOFError:
            break
        except UpslopeError as error:
            if not screen.interactive:
                raise
            screen.note(f"error: {error}", "red")
    if screen.interactive:
        screen.note("")
    return 0
