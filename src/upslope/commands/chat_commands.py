"""The commands of `upslope chat`: lines that begin with /."""

from __future__ import annotations

import difflib
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from upslope.commands.chat_session import SETTINGS, ChatSession, Reply
from upslope.data.records import read_records
from upslope.errors import ConfigError, DataError
from upslope.runs.lines import MetricLines

__all__ = ["COMMANDS", "Chat", "Command", "perform", "row_of_conversation"]


class Chat(Protocol):
    """What a command works on."""

    session: ChatSession
    screen: Any

    def respond(self, draw: Callable[..., Reply]) -> None:
        """Show the reply that `draw(show, stopped)` draws while it comes."""
        ...


@dataclass(frozen=True, slots=True)
class Command:
    """A command: what follows its name, what it does, and the function that does it."""

    usage: str
    summary: str
    run: Callable[[Chat, str], None]


def perform(chat: Chat, line: str) -> None:
    """Run the command of a line such as "/set top_k 40". Raises ConfigError for an unknown one; EOFError on /exit."""
    name, _, argument = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean /{near[0]}?" if near else "."
        names = " ".join(f"/{known}" for known in COMMANDS)
        raise ConfigError(f"no command /{name}{hint} There are: {names} (to say a text that begins with /, write //)")
    COMMANDS[name].run(chat, argument.strip())


def row_of_conversation(session: ChatSession) -> dict[str, Any]:
    """The conversation as a row that `upslope sft` takes. Raises DataError when it does not end with a reply."""
    if not session.turns or session.waiting:
        raise DataError("there is no reply to save yet")
    row: dict[str, Any] = {"messages": [m.as_mapping() for m in session.messages]}
    return row | ({"tools": list(session.tools)} if session.tools else {})


def _new(chat: Chat, argument: str) -> None:
    _nothing_after("new", argument)
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
    keys = [name.replace("-", "_")] if name else SETTINGS
    for key in keys:
        value = getattr(chat.session.options, key)
        chat.screen.note(f"{key} {shlex.join(value) if isinstance(value, tuple) else value}")


def _retry(chat: Chat, argument: str) -> None:
    _nothing_after("retry", argument)
    chat.respond(chat.session.retry)


def _undo(chat: Chat, argument: str) -> None:
    _nothing_after("undo", argument)
    chat.screen.note(f"taken back: {chat.session.undo()}")


def _edit(chat: Chat, argument: str) -> None:
    text = argument or chat.screen.revise(chat.session.last_user_text())
    if not text.strip():
        raise ConfigError("/edit wants the text that replaces your last turn")
    chat.respond(lambda show, stopped: chat.session.edit(text, show, stopped))


def _save(chat: Chat, argument: str) -> None:
    if not argument.lower().endswith(".jsonl"):
        raise ConfigError("/save wants the name of a .jsonl file, to which the conversation is added as a row")
    row = row_of_conversation(chat.session)
    lines = MetricLines(Path(argument).expanduser())
    try:
        lines.append(row)
        lines.flush()
    finally:
        lines.close()
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
    _nothing_after("tokens", argument)
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
    if not argument:
        chat.screen.note(chat.session.options.model)
        return
    chat.session.open(argument)
    chat.screen.note(f"{argument} goes on with the conversation; its context holds {chat.session.context} tokens")


def _help(chat: Chat, argument: str) -> None:
    _nothing_after("help", argument)
    heads = [f"/{name} {command.usage}".rstrip() for name, command in COMMANDS.items()]
    for head, command in zip(heads, COMMANDS.values(), strict=True):
        chat.screen.note(f"{head:<{max(map(len, heads))}}  {command.summary}")
    chat.screen.note("A line that ends with \\ goes on in the next; a text that begins with / is written with //.")


def _exit(chat: Chat, argument: str) -> None:
    _nothing_after("exit", argument)
    raise EOFError


def _nothing_after(name: str, argument: str) -> None:
    if argument:
        raise ConfigError(f"/{name} takes nothing after it, got {argument!r}")


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
