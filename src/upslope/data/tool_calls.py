"""Tool calls in the text of a model: found and parsed while it arrives.

The format is the common one (Hermes, Qwen, SmolLM): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one
object per pair of tags or a list of them. What stands between the tags and is not such JSON stays text.
"""

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

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
            begun = (length for length in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:length]))
            start = len(self._held) - next(begun, 0)
        return len(self._held[:start].rstrip())


def calls_in(text: str) -> tuple[str, list[ToolCall]]:
    """A whole text without the calls in it, and the calls."""
    parts = ToolReader().push(text, final=True)
    shown = "".join(part for part in parts if isinstance(part, str))
    return shown, [part for part in parts if isinstance(part, ToolCall)]


def _read(inner: str) -> list[ToolCall]:
    """The calls that stand between two tags; empty where it is anything else than well-formed calls."""
    try:
        value = json.loads(inner, parse_constant=_refuse)
        return [_call(entry) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return []


def _call(entry: Any) -> ToolCall:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError("a call has a name")
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, dict) or entry.keys() - {"name", "arguments", "parameters"}:
        raise ValueError("a call has arguments, and nothing else")
    return ToolCall(entry["name"], json.dumps(arguments, ensure_ascii=False))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
