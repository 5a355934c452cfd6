"""What a chat template leaves out in silence: found, and refused by name.

Everything given is replaced by a mark of its own and the conversation rendered once more: whose mark shows has its
place. Where a mark does not show, the proof is the conversation itself: the template writes the same text without that
part. A conversation of plain turns whose contents stand in the text in their order needs no second rendering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from upslope.errors import DataError
from upslope.types import Message

__all__ = ["LostError", "check_nothing_lost"]

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Message], Tools], str]
PLAIN = ("system", "user", "assistant")


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
    if plain and _in_order([message.content for message in messages], text):
        return
    marked = [_marked(k, message) for k, message in enumerate(messages)]
    shown = (_rendered(render, marked, _marked_tools(tools)) or "").lower()
    for part in _parts(messages, tools):
        if part.mark not in shown and _rendered(render, part.messages, part.tools) == text:
            raise LostError(part.message, part.kind)


def _in_order(contents: Sequence[str], text: str) -> bool:
    place = 0
    for content in contents:
        place = text.find(content.strip(), place)
        if place < 0:
            return False
        place += len(content.strip())
    return True


def _rendered(render: Render, messages: Sequence[Message], tools: Tools) -> str | None:
    """None where the template refuses, which shows that it looks at what was changed."""
    try:
        return render(messages, tools)
    except DataError:
        return None


def _parts(messages: Sequence[Message], tools: Tools) -> Iterator[_Part]:
    for i, tool in enumerate(tools):
        others = [*tools[:i], *tools[i + 1 :]]
        what = f"the chat template has no place for tools ({tool['function']['name']!r} is not shown): leave them out"
        yield _Part(_mark("tool", i), what, "tools", messages, others)
    for k, message in enumerate(messages):

        def without(k: int = k, message: Message = message, **changes: Any) -> list[Message]:
            return [*messages[:k], replace(message, **changes), *messages[k + 1 :]]

        name = f"message {k + 1} of {len(messages)} ({message.role})"
        if message.content.strip():
            what = f"{name}: the chat template has no place for its content"
            beside = " beside tool_calls" if message.tool_calls else ""
            yield _Part(_mark("content", k), f"{what}{beside}", "messages", without(content=""), tools)
        calls = message.tool_calls
        for j, call in enumerate(calls):
            what = f"{name}: the chat template has no place for tool_calls (its call of {call['function']['name']!r})"
            rest = (*calls[:j], *calls[j + 1 :])
            yield _Part(_mark("call", k, j), what, "messages", without(tool_calls=rest), tools)
            if call["function"]["arguments"]:
                bare = {**call, "function": {**call["function"], "arguments": {}}}
                fewer = (*calls[:j], bare, *calls[j + 1 :])
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


def _marked_tools(tools: Tools) -> Tools:
    return [{**tool, "function": {**tool["function"], "name": _mark("tool", i)}} for i, tool in enumerate(tools)]
