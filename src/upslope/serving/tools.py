"""Tool calls in the text of a model: found and parsed while it arrives, or asked for by a grammar.

The format is the common one (Hermes, Qwen, SmolLM): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one
object per pair of tags or a list of them. What stands between the tags and is not such JSON stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from upslope.serving.constraints import Grammars, json_rule

__all__ = ["CLOSE", "OPEN", "Marks", "ToolCall", "ToolReader", "calls_grammar", "offered_grammar"]

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is a JSON object as text, as the protocol carries it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class ToolReader:
    """Text in pieces -> what can be shown, and calls, in the order in which they were written.

    White space beside a call is dropped; what may yet turn out to open a call, or to stand before one, is held back.
    """

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False
        self.num_calls = 0

    def push(self, piece: str, *, final: bool = False) -> list[str | ToolCall]:
        """Add text; `final` decides what was held back: a call without its closing tag counts if it is complete."""
        self._held += piece
        found: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, start)
            if end < 0 and not final:
                break
            inner = self._held[start + len(OPEN) : end if end >= 0 else None]
            rest = self._held[end + len(CLOSE) :] if end >= 0 else ""
            calls = _read(inner)
            if calls:
                self._show(self._held[:start].rstrip(), found)
                found += calls
                self.num_calls += len(calls)
                self._after_call = True
            else:
                self._show(self._held[: len(self._held) - len(rest)], found)
            self._held = rest
        settled = len(self._held) if final else self._settled()
        shown, self._held = self._held[:settled], self._held[settled:]
        self._show(shown, found)
        return found

    def _show(self, text: str, found: list[str | ToolCall]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            found.append(text)

    def _settled(self) -> int:
        """Where the tail begins that has to wait: an open tag or the beginning of one, and white space before it."""
        start = self._held.find(OPEN)
        if start < 0:
            start = len(self._held)
            for length in range(min(len(OPEN) - 1, start), 0, -1):
                if self._held.endswith(OPEN[:length]):
                    start -= length
                    break
        return len(self._held[:start].rstrip())


def _read(inner: str) -> list[ToolCall]:
    """The calls that stand between two tags; empty where it is anything else than well-formed calls."""
    try:
        value = json.loads(inner, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return []
    entries = value if isinstance(value, list) else [value]
    calls = [_call(entry) for entry in entries]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(entry: Any) -> ToolCall | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, dict) or entry.keys() - {"name", "arguments", "parameters"}:
        return None
    return ToolCall(entry["name"], json.dumps(arguments, ensure_ascii=False))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


@dataclass(frozen=True, slots=True)
class Marks:
    """How a grammar writes the tags: as text in quotes, or as the token of its own that a tokenizer has for a tag.

    visible: the other tokens that a grammar can only name by number though text shows them, such as `<think>`.
    """

    open: str
    close: str
    visible: str | None

    @classmethod
    def of(cls, grammars: Grammars) -> Marks:
        """The marks of the tokenizer that the grammars are for."""
        own = grammars.named_tokens
        written = [f"<[{own[tag]}]>" if tag in own else json.dumps(tag) for tag in (OPEN, CLOSE)]
        others = [str(token) for name, token in own.items() if name not in (OPEN, CLOSE)]
        return cls(*written, f"<[{','.join(others)}]>" if others else None)


Functions = Mapping[str, Mapping[str, Any]]
"""Names of functions with the JSON Schemas of their arguments."""


def calls_grammar(functions: Functions, marks: Marks, *, several: bool) -> str:
    """The Lark grammar of llguidance for a call, or for several."""
    start = 'start: call ("\\n" call)*' if several else "start: call"
    return "\n".join(["%llguidance {}", start, f"call: {marks.open} body", *_body_rules(functions, marks)])


def offered_grammar(functions: Functions, marks: Marks, *, several: bool) -> str:
    """The same where the model may call or not: any text, in which a tag is followed by nothing but a valid call."""
    lines = ["%llguidance {}", f"start: call{'*' if several else '?'} text"]
    lines.append("text: TEXT?" if marks.visible is None else f"text: TEXT? ({marks.visible} TEXT?)*")
    if marks.open.startswith("<["):
        lines.append(f"call: text {marks.open} body")
    else:
        before = "" if marks.visible is None else f"(TEXT? {marks.visible})* "
        lines += [f"call: {before}opened body", f"opened[lazy]: /(.|\\n)*{OPEN}/"]
    lines.append(f"TEXT: /(.|\\n)+/ & ~/(.|\\n)*{OPEN}(.|\\n)*/")
    return "\n".join([*lines, *_body_rules(functions, marks)])


def _body_rules(functions: Functions, marks: Marks) -> list[str]:
    names = [f"call_{i}" for i in range(len(functions))]
    rules = [f"body: {' | '.join(names)}"]
    for rule, (name, schema) in zip(names, functions.items(), strict=True):
        head = json.dumps("\n" + json.dumps({"name": name})[:-1] + ', "arguments": ')
        rules.append(f'{rule}: {head} {json_rule(schema)} "}}\\n" {marks.close}')
    return rules
