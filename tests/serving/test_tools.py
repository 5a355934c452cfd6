"""Calls in text: found whole or in pieces of any size, and nothing that is shown is taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from upslope.data.messages import ToolCall, ToolReader


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


READINGS: list[tuple[str, list[Any]]] = [
    ("plain text, a < b and <tool", ["plain text, a < b and <tool"]),
    ("ends in space  \n", ["ends in space  \n"]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', [("f", {"x": 1})]),
    ('Look:\n\n<tool_call>\n{"name": "f"}\n</tool_call>\n', ["Look:", ("f", {})]),
    ('<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call> ok', [("f", {}), ("g", {}), "ok"]),
    ('<tool_call>[{"name": "f"}, {"name": "g", "parameters": {"y": []}}]</tool_call>', [("f", {}), ("g", {"y": []})]),
    ('<tool_call>{"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})]),
    ('<tool_call>{"name": "f", "argum', ['<tool_call>{"name": "f", "argum']),
    ("a <tool_call>no json</tool_call> b", ["a <tool_call>no json</tool_call> b"]),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None),
    ('<tool_call>{"name": 3}</tool_call>', None),
    ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None),
    ('<tool_call>{"name": "f", "danger": 1}</tool_call>', None),
    ("<tool_call></tool_call>", None),
    ("<tool_call>[]</tool_call>", None),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", None),
    ("</tool_call> alone <tool_call", ["</tool_call> alone <tool_call"]),
    ('<tool_call>{"name": "f", "arguments": {"s": "é <b> "}}</tool_call>', [("f", {"s": "é <b> "})]),
]


@pytest.mark.parametrize(("text", "expected"), READINGS, ids=[text[:40] for text, _ in READINGS])
def test_reading_calls(text: str, expected: list[Any] | None) -> None:
    """Whole or in pieces of any size: the same text and calls (None: all of it stays text)."""
    for size in (1, 3, 7, len(text)):
        if size < 7 and len(text) > 10_000:
            continue
        reader, found = ToolReader(), []
        for piece in pieces(text, size):
            found += reader.push(piece)
        found += reader.push("", final=True)
        joined: list[Any] = []
        for item in found:
            if isinstance(item, ToolCall):
                joined.append((item.name, json.loads(item.arguments)))
            elif joined and isinstance(joined[-1], str):
                joined[-1] += item
            else:
                joined.append(item)
        assert joined == ([text] if expected is None else expected)


def test_what_is_shown_is_never_taken_back() -> None:
    """An opening tag is held back from its first character on, with the white space before it."""
    reader = ToolReader()
    assert reader.push("so \n") == ["so"]
    assert reader.push("<tool_") == []
    assert reader.push("box>") == [" \n<tool_box>"]
