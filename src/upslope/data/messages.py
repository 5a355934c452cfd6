"""The one door for messages and tools, whoever brings them: a row of a data file, a request to the server.

What comes in is OpenAI's form; what goes on is what chat templates want (transformers' form): `arguments` as an object,
content as one text, "developer" as "system", a bare {name, arguments} as a function. What has no place in a Message is
refused by name, never dropped. Free of torch.

Calls in the text of a model are found and parsed while it arrives. Their format is the common one (Hermes, Qwen,
SmolLM): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one object per pair of tags or a list of them. What
stands between the tags and is not such JSON stays text.
"""

import difflib
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from upslope.errors import DataError
from upslope.types import Message

ROLES = (
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation",
)  # fmt: skip
_SPOKEN = ("system", "developer", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "function_response": "tool"}
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "train", "weight")
_CALL_KEYS = ("id", "type", "function")


@contextmanager
def at(where: str) -> Iterator[None]:
    """A DataError of the block begins with `where`, unless it does already."""
    try:
        yield
    except DataError as error:
        if not (said := str(error)).startswith(where):
            error.args = (f"{where}: {said}",)
        raise


def message_of(entry: Any, key: str, where: str = "") -> Message:
    """The message of a mapping {role, content, name, tool_calls, tool_call_id, train | weight}; null is not given.

    Raises DataError that begins with `where` (left out: what an `at` around it says) and names `key`: an unknown key or
    role, a part that is no text, arguments that are no JSON object, calls or their ids in a turn that cannot have them.
    """
    with at(where):
        entry = _given(entry, key, "with role and content", _MESSAGE_KEYS)
        if "role" not in entry:
            raise DataError(f"{key!r} has no 'role'; add it (one of {', '.join(ROLES)})")
        role = _role(entry["role"], key)
        written = entry.get("tool_calls", ())
        if not isinstance(written, (list, tuple)) or not all(isinstance(call, Mapping) for call in written):
            raise DataError(f"'{key}.tool_calls' must be a list of objects, is {described(written)}")
        calls = tuple(_call(call, f"{key}.tool_calls[{i}]") for i, call in enumerate(written))
        if calls and role != "assistant":
            raise DataError(f"'{key}.tool_calls' belong to an assistant message, this one is from {role!r}")
        if "tool_call_id" in entry and role in _SPOKEN:
            raise DataError(f"'{key}.tool_call_id' belongs to a tool's message, this one is from {role!r}")
        if "content" not in entry and not calls:
            raise DataError(f"{key!r} has no 'content'; add it")
        content = _parts(entry.get("content", ""), f"{key}.content")
        name, answered = (text_of(entry[k], f"{key}.{k}") if k in entry else None for k in ("name", "tool_call_id"))
        role = "system" if role == "developer" else role
        return Message(role, content, name, calls, train_of(entry, key), answered)


def tools_of(value: Any, where: str = "") -> tuple[Mapping[str, Any], ...]:
    """The functions offered, each {type, function: {name, description, parameters, ...}}, in the order models know.

    `strict` is left out: it says how arguments are drawn, not what the model reads. Raises DataError as `message_of`.
    """
    if not value:
        return ()
    with at(where):
        if isinstance(value, str):
            value = parsed(value, "tools")
        if not isinstance(value, (list, tuple)):
            raise DataError(f"'tools' must be a list of objects, is {described(value)}")
        return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(value))


def text_of(value: Any, key: str, *, empty: bool = False) -> str:
    """A text that is UTF-8, and not empty unless it may be."""
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a text, is {described(value)}{remedy(value)}")
    if not value and not empty:
        raise DataError(f"{key!r} is empty; fill it in or drop the record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"character {error.start + 1}"
        raise DataError(f"{key!r} holds half a surrogate pair at {place}; correct it") from error
    return value


def list_of(value: Any, key: str, of: str) -> Sequence[Any]:
    """A list that is not empty; of a CSV cell, the JSON in it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, key)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{key!r} must be a list of {of}, is {described(value)}{remedy(value)}")
    if not value:
        raise DataError(f"{key!r} is an empty list; fill it in or drop the record")
    return value


def finite(value: Any) -> float | None:
    """A number, or a text that is one; None for anything else, and for NaN and infinity."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def train_of(entry: Mapping[str, Any], key: str) -> bool | None:
    """`train`, or `weight` 0 or 1 as hosted fine-tuning formats write it."""
    found = None
    for name in ("train", "weight"):
        if (value := entry.get(name)) is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"'{key}.{name}' must be true or false, is {described(value)}")
        if found not in (None, bool(value)):
            raise DataError(f"{key!r} says train and weight, and they differ; give one")
        found = bool(value)
    return found


def described(value: Any) -> str:
    """A value for a message: its type and how it begins."""
    if _missing(value):
        return "null" if value is None else "NaN"
    shown = repr(value)
    return f"{type(value).__name__} {shown[:40]}{'…' if len(shown) > 40 else ''}"


def remedy(value: Any) -> str:
    """What to do about a value that is missing."""
    return "; fill it in or drop the record" if _missing(value) else ""


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _given(entry: Any, key: str, what: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """What a mapping holds besides nulls; DataError for no mapping, or a key that is not known."""
    if not isinstance(entry, Mapping):
        raise DataError(f"{key!r} must be an object {what}, is {described(entry)}")
    entry = {name: value for name, value in entry.items() if value is not None}
    for name in entry:
        if known is not None and name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(known)}"
            raise DataError(f"{key!r} has the unknown key {name!r}; {hint}")
    return entry


def _role(value: Any, key: str) -> str:
    if value in ROLES:
        return str(value)
    near = difflib.get_close_matches(str(value), ROLES, n=1) or [_OTHER_NAMES.get(str(value), "")]
    hint = f"did you mean {near[0]!r}?" if near[0] else f"accepted: {', '.join(ROLES)}"
    raise DataError(f"{key!r} has the unknown role {described(value)}; {hint}")


def _parts(value: Any, key: str) -> str:
    """Message content: a text, or a list of text parts as serving APIs write them."""
    if not isinstance(value, (list, tuple)):
        return text_of(value, key, empty=True)
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise DataError(f"{key!r} has a part that is no text; only text can be trained on")
        part = _given(part, f"{key}[{i}]", "with type and text", ("type", "text"))
        texts.append(text_of(part.get("text"), f"{key}[{i}].text", empty=True))
    return "".join(texts)


def _call(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entry = _given(_nested(entry), key, "with id, type and function", _CALL_KEYS)
    given = _given(entry.get("function"), f"{key}.function", "with name and arguments", ("name", "arguments"))
    _check_type(entry, key)
    named = {"id": text_of(entry["id"], f"{key}.id")} if "id" in entry else {}
    name = text_of(given.get("name"), f"{key}.function.name")
    whose = f"{key}.function.arguments" + "".join(f" of call {call_id[:64]}" for call_id in named.values())
    if isinstance((arguments := given.get("arguments", {})), str):
        arguments = parsed(arguments, whose)
    return {**named, "type": "function", "function": {"name": name, "arguments": _object(arguments, whose)}}


def _nested(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A bare {name, ...} as {type, function: {name, ...}}; anything else as it is."""
    if "function" in entry or "name" not in entry:
        return entry
    outer = {k: v for k, v in entry.items() if k in ("id", "type")}
    return {**outer, "function": {k: v for k, v in entry.items() if k not in outer}}


def _check_type(entry: Mapping[str, Any], key: str) -> None:
    if entry.get("type", "function") != "function":
        raise DataError(f"'{key}.type' must be 'function', is {described(entry['type'])}")


def _tool(entry: Any, key: str) -> Mapping[str, Any]:
    entry = _given(entry, key, "with type and function", None)
    entry = _given(_nested(entry), key, "with type and function", ("type", "function"))
    _check_type(entry, key)
    function = _given(entry.get("function"), f"{key}.function", "with name and parameters", None)
    text_of(function.get("name"), f"{key}.function.name")
    order = ("name", "description", "parameters")
    kept = {k: function[k] for k in order if k in function}
    kept |= {k: v for k, v in function.items() if k not in (*order, "strict")}
    return {"type": "function", "function": _object(kept, f"{key}.function")}


def parsed(text: str, key: str) -> Any:
    """What a text of JSON holds."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{key!r} is not valid JSON: {' '.join(str(error).split())}") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _object(value: Any, key: str) -> dict[str, Any]:
    """A mapping that JSON and UTF-8 can hold, as plain dicts and lists."""
    if not isinstance(value, Mapping):
        raise DataError(f"{key!r} must be a JSON object, is {described(value)}")
    try:
        return json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain_mapping).encode())
    except UnicodeEncodeError as error:
        raise DataError(f"{key!r} holds half a surrogate pair; correct it") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{key!r} is not JSON: {' '.join(str(error).split())}") from error


def _plain_mapping(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is a JSON object as text, as the protocol carries it."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


@dataclass(slots=True)
class ToolReader:
    """Text in pieces -> what can be shown, and calls, in the order in which they were written.

    White space beside a call is dropped; what may yet turn out to open a call, or to stand before one, is held back.
    """

    _held: str = ""
    _after_call: bool = False

    def push(self, piece: str, *, final: bool = False) -> list[str | ToolCall]:
        """Add text; `final` decides what was held back: a call without its closing tag counts if it is complete."""
        self._held += piece
        found: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            if (end := self._held.find(CLOSE, start)) < 0 and not final:
                break
            inner = self._held[start + len(OPEN) : end if end >= 0 else None]
            rest = self._held[end + len(CLOSE) :] if end >= 0 else ""
            calls = _read(inner)
            self._show(self._held[:start].rstrip() if calls else self._held[: len(self._held) - len(rest)], found)
            if calls:
                found += calls
                self._after_call = True
            self._held = rest
        settled = len(self._held) if final else self._settled()
        self._show(self._held[:settled], found)
        self._held = self._held[settled:]
        return found

    def _show(self, text: str, found: list[str | ToolCall]) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            found.append(text)

    def _settled(self) -> int:
        """Where the tail begins that has to wait: an open tag or the beginning of one, and white space before it."""
        if (start := self._held.find(OPEN)) < 0:
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
        return [_written_call(entry) for entry in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return []


def _written_call(entry: Any) -> ToolCall:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError("a call has a name")
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(arguments, dict) or entry.keys() - {"name", "arguments", "parameters"}:
        raise ValueError("a call has arguments, and nothing else")
    return ToolCall(entry["name"], json.dumps(arguments, ensure_ascii=False))
