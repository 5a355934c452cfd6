"""The text that names a task or a reward: `name`, `name:key=value,key=value` or `path/file.py:Name:key=value`."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from upslope.errors import ConfigError

Value = int | float | bool | str

_FILE = re.compile(r"(?P<path>.+\.py):(?P<attribute>[^:]*)(?::(?P<params>.*))?", re.DOTALL)
_KEY = re.compile(r"\s*(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*")
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DOUBLE = re.compile(r'"(?:[^"\\]|\\.)*"')
_SINGLE = re.compile(r"'[^']*'")
_BARE = re.compile(r"[^,]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./+*~@%|:-]+(?: [A-Za-z0-9_./+*~@%|:-]+)*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed name: a built-in `name`, or `attribute` of the Python file `path`, with parameters."""

    name: str
    params: dict[str, Value] = field(default_factory=dict)
    path: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.path}:{self.name}" if self.path else self.name


def parse_spec(text: str) -> Spec:
    """Read a task's or reward's name. Values are int, float, bool (true, false) or text; quotes keep them text.

    Raises ConfigError that shows the part it could not read.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError("a task or reward needs a name, such as 'gsm8k:path=train.jsonl' or 'my_task.py:MyTask'")
    text = text.strip()
    in_file = _FILE.fullmatch(text)
    if in_file:
        attribute = in_file["attribute"].strip()
        if not attribute.isidentifier():
            raise ConfigError(f"'{text}': what follows the file must be a name in it, as in 'my_task.py:MyTask'")
        return Spec(attribute, _parse_params(in_file["params"] or "", text), in_file["path"])
    if text.endswith(".py"):
        raise ConfigError(f"'{text}': say which name in the file is meant, as in '{text}:MyTask'")
    name, _, params = text.partition(":")
    return Spec(name.strip(), _parse_params(params, text))


def format_spec(spec: Spec) -> str:
    """The text that `parse_spec` reads back as an equal Spec."""
    params = ",".join(f"{key}={_format_value(value, key)}" for key, value in spec.params.items())
    return f"{spec.label}:{params}" if params else spec.label


def parse_value(text: str) -> Value:
    """int, float, bool or text, whichever the text looks like (never nan or inf)."""
    stripped = text.strip()
    if _INT.fullmatch(stripped):
        return int(stripped)
    if _FLOAT.fullmatch(stripped):
        return float(stripped)
    if stripped.lower() in ("true", "false"):
        return stripped.lower() == "true"
    return stripped


def _parse_params(text: str, whole: str) -> dict[str, Value]:
    params: dict[str, Value] = {}
    position = 0
    while position < len(text):
        key = _KEY.match(text, position)
        if key is None:
            raise ConfigError(f"'{whole}': cannot read '{text[position:]}'; parameters are key=value, split by commas")
        if key["key"] in params:
            raise ConfigError(f"'{whole}': parameter '{key['key']}' is given twice")
        value, position = _read_value(text, key.end(), whole)
        params[key["key"]] = value
        rest = text[position:].lstrip()
        if rest and not rest.startswith(","):
            raise ConfigError(f"'{whole}': unexpected '{rest}' after the value of '{key['key']}'")
        position = len(text) - len(rest) + 1
    return params


def _read_value(text: str, start: int, whole: str) -> tuple[Value, int]:
    if text[start : start + 1] in ('"', "'"):
        pattern = _DOUBLE if text[start] == '"' else _SINGLE
        match = pattern.match(text, start)
        if match is None:
            raise ConfigError(f"'{whole}': the quote before '{text[start + 1 :]}' is never closed")
        if pattern is _SINGLE:
            return match[0][1:-1], match.end()
        try:
            return json.loads(match[0], strict=False), match.end()
        except ValueError as error:
            raise ConfigError(
                f"'{whole}': bad escape in {match[0]} ({error}); use single quotes for text as is"
            ) from None
    match = _BARE.match(text, start)
    assert match is not None
    return parse_value(match[0]), match.end()


def _format_value(value: Value, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"parameter '{key}' must be finite, got {value}")
        return repr(value)
    if not isinstance(value, str):
        raise ConfigError(f"parameter '{key}' must be a number, a bool or text, got {type(value).__name__}")
    if _PLAIN.fullmatch(value) and isinstance(parse_value(value), str):
        return value
    return json.dumps(value)


def suggest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean ...?)' or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_params(
    function: Callable[..., Any], params: Mapping[str, Any], label: str, *, skip: int = 0, filled: Iterable[str] = ()
) -> None:
    """Refuse parameters that `function` does not take or whose simple annotation they do not fit.

    skip: how many leading parameters the caller fills itself; filled: others it fills, by name. A function with
    **keywords judges those that it does not name itself.
    """
    known = list(inspect.signature(function).parameters.values())[skip:]
    is_open = any(p.kind is p.VAR_KEYWORD for p in known)
    names = {p.name: p for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    names = {name: p for name, p in names.items() if name not in tuple(filled)}
    for key, value in params.items():
        if key not in names and is_open:
            continue
        if key not in names:
            listed = ", ".join(names) or "none"
            raise ConfigError(f"'{label}' has no parameter '{key}'{suggest(key, names)} (it takes: {listed})")
        annotation = names[key].annotation
        kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        allowed = _KINDS.get(kind)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise ConfigError(f"'{label}': parameter '{key}' must be {kind}, got {value!r}")
    missing = [name for name, p in names.items() if p.default is p.empty and name not in params]
    if missing:
        raise ConfigError(f"'{label}' needs the parameter '{missing[0]}', as in '{label}:{missing[0]}=...'")
