"""What a chat template leaves out in silence: found, and refused by name.

Everything given is replaced by a mark of its own and the conversation rendered once more: whose mark shows has its
place. Where a mark does not show, the proof is the conversation itself: the template writes the same text without that
part. A conversation of plain turns whose contents stand in the text in their order needs no second rendering.

What a template cuts is found without rendering: a content is whole where its characters, white space aside, stand in
the text in their order, as they are or escaped (JSON, HTML). White space and what is written between them are the
template's own.
"""

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from upslope.errors import DataError
from upslope.types import Message

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Message], Tools], str]
PLAIN = ("system", "user", "assistant")
_SWITCH = re.compile(r"/\w+")
"""/think, /no_think and their like: orders to the template, which some take out of what they write."""


class LostError(DataError):
    """The chat template has no place for a part of the conversation; `part` says whether tools or messages hold it."""

    def __init__(self, message: str, part: Literal["tools", "messages"]) -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing that has to show: its mark, what it is, and the conversation without it."""

    mark: str
    message: str
    kind: Literal["tools", "messages"]
    messages: Sequence[Message]
    tools: Tools


def check_nothing_lost(messages: Sequence[Message], tools: Tools, text: str, render: Render) -> None:
    """LostError where `text`, which `render` made of messages and tools, would be the same without a part of them.

    The parts: the tools, each call and its arguments, each content that is not blank. Names and ids of calls are given
    to the template, which need not show them.
    """
    plain = not tools and all(message.role in PLAIN and not message.tool_calls for message in messages)
    if plain and _in_order((message.content.strip() for message in messages), text):
        return
    marked = [_marked(k, message) for k, message in enumerate(messages)]
    offered = [{**tool, "function": {**tool["function"], "name": _mark("tool", i)}} for i, tool in enumerate(tools)]
    shown = (_rendered(render, marked, offered) or "").lower()
    for part in _parts(messages, tools):
        if part.mark not in shown and _rendered(render, part.messages, part.tools) == text:
            raise LostError(part.message, part.kind)


def check_nothing_cut(messages: Sequence[Message], text: str, starts: Mapping[int, int | None]) -> None:
    """LostError where a content that is not an assistant's does not stand in `text` whole.

    Assistant turns are looked at where they are trained on: templates leave out of earlier ones what the model thought.
    starts: where each assistant turn begins in the text, by message, where that is known.
    """
    for k, message in enumerate(messages):
        if message.role == "assistant" or message.content.strip() in text:
            continue
        room = _room(messages, k, text, starts)
        if (piece := _missing(message.content, room)) and _missing(_SWITCH.sub("", message.content), room):
            raise LostError(
                f"{name_of(messages, k)}: the chat template leaves out a part of its content ({piece!r}): "
                "use a template that keeps it, or data without it",
                "messages",
            )


def check_reply_whole(prompt: str, reply: str, turn: Message) -> None:
    """DataError where a part of a turn is not in its `reply`, the text that is trained on; `prompt` ends before it.

    A content may begin with what the prompt ends with, as where a generation prompt opens <think>.
    """
    trained = "the part that the chat template says is trained on"
    for call in turn.tool_calls:
        if (called := str(call["function"]["name"])).lower() not in reply.lower():
            raise DataError(
                f"its call of {called!r} does not stand in {trained}, so the model would learn to reply "
                "without it; correct the template, or set train to false"
            )
        for argument, value in call["function"]["arguments"].items():
            if piece := next((piece for leaf in _leaves(value) if (piece := _missing(leaf, reply))), None):
                raise DataError(
                    f"argument {argument!r} of its call of {called!r} does not stand whole in {trained} "
                    f"({piece!r} is missing): use a template that keeps it, or set train to false"
                )
    if (piece := _missing(turn.content, reply)) and _missing(_unopened(turn.content, prompt), reply):
        raise DataError(
            f"a part of its content does not stand in {trained} ({piece!r} is missing), so the model would "
            "learn to reply without it: use a template that keeps it, or data without it, or set train to false"
        )


def name_of(messages: Sequence[Message], k: int) -> str:
    """How errors call message k."""
    return f"message {k + 1} of {len(messages)} ({messages[k].role})"


def _room(messages: Sequence[Message], k: int, text: str, starts: Mapping[int, int | None]) -> str:
    """The part of the text in which message k must stand: between where its neighbours certainly end and begin."""
    low = max((start for j, start in starts.items() if j < k and start is not None), default=0)
    high = min((start for j, start in starts.items() if j > k and start is not None), default=len(text))
    if k and (before := messages[k - 1].content.strip()) and (place := text.find(before, low, high)) >= 0:
        low = place + len(before)
    following = [message.content.strip() for message in messages[k + 1 : k + 2] if message.role != "assistant"]
    if any(following) and (place := text.rfind(following[0], low, high)) >= 0:
        high = place
    return text[low:high]


def _missing(content: str, text: str) -> str | None:
    """How the first part of a content that `text` does not have begins; None where the content is whole."""
    if content.strip() in text:
        return None
    letters = _letters(text)
    if (
        _in_order(_letters(content), letters)
        or _in_order(_letters(json.dumps(content)[1:-1]), letters)
        or ("&" in text and _in_order(_letters(content), _letters(html.unescape(text))))
    ):
        return None
    place = 0
    for word in re.finditer(r"\S+", content):
        if (found := text.find(word[0], place)) < 0:
            rest = " ".join(content[word.start() : word.start() + 60].split())
            return rest if len(rest) <= 40 else f"{rest[:40]}…"
        place = found + len(word[0])
    return None


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()


def _unopened(content: str, prompt: str) -> str:
    """The content, letters alone, without the longest beginning that the prompt ends with."""
    letters, given = _letters(content), _letters(prompt[-400:])
    longest = min(len(letters), len(given))
    return letters[next((n for n in range(longest, 0, -1) if given.endswith(letters[:n])), 0) :]


def _leaves(value: Any) -> Iterator[str]:
    """The plain values inside one, as JSON writes them."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def _in_order(parts: Iterable[str], text: str) -> bool:
    """Whether all parts (of a text: its letters) stand in the text, one behind the other."""
    place = 0
    for part in parts:
        if (found := text.find(part, place)) < 0:
            return False
        place = found + len(part)
    return True


def _rendered(render: Render, messages: Sequence[Message], tools: Tools) -> str | None:
    """None where the template refuses, which shows that it looks at what was changed."""
    with suppress(DataError):
        return render(messages, tools)
    return None


def _parts(messages: Sequence[Message], tools: Tools) -> Iterator[_Part]:
    for i, tool in enumerate(tools):
        others = [*tools[:i], *tools[i + 1 :]]
        what = f"the chat template has no place for tools ({tool['function']['name']!r} is not shown): leave them out"
        yield _Part(_mark("tool", i), what, "tools", messages, others)
    for k, message in enumerate(messages):

        def without(k: int = k, message: Message = message, **changes: Any) -> list[Message]:
            return [*messages[:k], replace(message, **changes), *messages[k + 1 :]]

        lacks, calls = f"{name_of(messages, k)}: the chat template has no place for", message.tool_calls
        if message.content.strip():
            what = f"{lacks} its content{' beside tool_calls' if calls else ''}"
            yield _Part(_mark("content", k), what, "messages", without(content=""), tools)
        for j, call in enumerate(calls):
            what = f"{lacks} tool_calls (its call of {call['function']['name']!r})"
            yield _Part(_mark("call", k, j), what, "messages", without(tool_calls=(*calls[:j], *calls[j + 1 :])), tools)
            if call["function"]["arguments"]:
                fewer = (*calls[:j], {**call, "function": {**call["function"], "arguments": {}}}, *calls[j + 1 :])
                what = f"{what}: the arguments are not shown"
                yield _Part(_mark("argument", k, j), what, "messages", without(tool_calls=fewer), tools)


def _mark(kind: str, *place: int) -> str:
    return f"qz{kind}{'x'.join(map(str, place))}qz"


def _marked(k: int, message: Message) -> Message:
    """The message with a mark for its content, and for name and arguments of every call."""
    calls = []
    for j, call in enumerate(message.tool_calls):
        arguments = {_mark("argument", k, j): _mark("argument", k, j)} if call["function"]["arguments"] else {}
        calls.append({**call, "function": {"name": _mark("call", k, j), "arguments": arguments}})
    content = _mark("content", k) if message.content.strip() else message.content
    return replace(message, content=content, tool_calls=tuple(calls))
