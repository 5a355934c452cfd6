"""The commands of `upslope chat`, lines that begin with /, and the conversation that they work on."""

import difflib
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upslope.commands.chat_screen import Screen, stop_on_ctrl_c
from upslope.commands.chat_session import SETTINGS, ChatSession, Reply, Show, Stopped
from upslope.data.records import read_records
from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.runs.lines import MetricLines


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and the screen that it is shown on."""

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


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what may follow its name, what it does, and the function that does it."""

    usage: str
    summary: str
    run: Callable[[Chat, str], None]


def _new(chat: Chat, argument: str) -> None:
    chat.session.start()
    chat.screen.note("a new conversation")


def _system(chat: Chat, argument: str) -> None:
    before, chat.session.system = chat.session.system, argument or None
    if argument:
        chat.screen.note("the system turn is set, from the next reply on")
    else:
        chat.screen.note("there was no system turn" if before is None else f"the system turn is gone; it was: {before}")


def _set(chat: Chat, argument: str) -> None:
    try:
        name, *words = shlex.split(argument) or [""]
    except ValueError as error:
        raise ConfigError(f"/set: {error}") from None
    if name:
        chat.session.set(name, words)
    for key in [name.replace("-", "_")] if name else SETTINGS:
        value = getattr(chat.session.options, key)
        chat.screen.note(f"{key} {shlex.join(value) if isinstance(value, tuple) else value}")


def _retry(chat: Chat, argument: str) -> None:
    chat.respond(chat.session.retry)


def _undo(chat: Chat, argument: str) -> None:
    chat.screen.note(f"taken back: {chat.session.undo()}")


def _edit(chat: Chat, argument: str) -> None:
    text = argument or chat.screen.revise(chat.session.last_user_text())
    if not text.strip():
        raise ConfigError("/edit wants the text that replaces your last turn")
    chat.respond(partial(chat.session.edit, text))


def _save(chat: Chat, argument: str) -> None:
    if not argument.lower().endswith(".jsonl"):
        raise ConfigError("/save wants the name of a .jsonl file, to which the conversation is added as a row")
    row = chat.session.row
    with closing(MetricLines(Path(argument).expanduser())) as lines:
        lines.append(row)
        lines.flush()
    chat.screen.note(f"added to {argument}: {len(row['messages'])} messages")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise ConfigError("/load wants the name of a file of conversations, whose last one it takes")
    records = read_records(argument)
    chat.session.load(records[-1])
    chat.screen.note(f"conversation {len(records)} of {len(records)} in {argument}")
    for message in chat.session.messages:
        chat.screen.note(f"{message.role}: {message.content}")
    if chat.session.waiting:
        chat.screen.note("its last turn has no reply yet: /retry draws it")


def _tokens(chat: Chat, argument: str) -> None:
    reply = chat.session.last
    if reply is None:
        raise DataError("no reply was drawn yet in this conversation")
    completion, decode = reply.completion, chat.session.tokenizer.decode
    tops = completion.top_logprobs or [{} for _ in completion.tokens]
    for token, logprob, alternatives in zip(completion.tokens, completion.policy_logprobs, tops, strict=True):
        others = [(math.exp(x), decode([i])) for i, x in alternatives.items() if i != token]
        chat.screen.token(math.exp(logprob), decode([token]), others)
    total = math.fsum(completion.policy_logprobs)
    temperature = chat.session.options.temperature or 1.0
    chat.screen.note(f"{len(completion.tokens)} tokens, log-prob {total:.3f} at temperature {temperature:g}")


def _model(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.open(argument)
        argument = f"{argument} goes on with the conversation; its context holds {chat.session.context} tokens"
    chat.screen.note(argument or chat.session.options.model)


def _help(chat: Chat, argument: str) -> None:
    heads = [f"/{name} {command.usage}".rstrip() for name, command in COMMANDS.items()]
    for head, command in zip(heads, COMMANDS.values(), strict=True):
        chat.screen.note(f"{head:<{max(map(len, heads))}}  {command.summary}")
    chat.screen.note("A line that ends with \\ goes on in the next; a text that begins with / is written with //.")


def _exit(chat: Chat, argument: str) -> None:
    raise EOFError


COMMANDS: dict[str, Command] = {
    "new": Command("", "begin again; the system turn stays", _new),
    "system": Command("[TEXT]", "set the system turn; without TEXT take it away", _system),
    "set": Command("[KEY VALUE]", f"how replies are drawn: {' '.join(SETTINGS)}", _set),
    "retry": Command("", "draw the last reply again", _retry),
    "undo": Command("", "take back your last turn and its reply", _undo),
    "edit": Command("[TEXT]", "say your last turn differently", _edit),
    "save": Command("FILE", "add the conversation to a .jsonl file, as a row that upslope sft reads", _save),
    "load": Command("FILE", "go on with the last conversation of a file", _load),
    "tokens": Command("", "the last reply's tokens with their probabilities and alternatives", _tokens),
    "model": Command("[SOURCE]", "go on with another model", _model),
    "help": Command("", "this list", _help),
    "exit": Command("", "end; Ctrl-D does, too", _exit),
}
