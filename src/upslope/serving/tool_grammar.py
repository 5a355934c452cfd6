"""Grammars for tool calls in the form that `data.tool_calls` reads: that must come, or that may."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from upslope.data.tool_calls import CLOSE, OPEN
from upslope.serving.constraints import Grammars, json_rule

__all__ = ["Marks", "calls_grammar", "offered_grammar"]


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
