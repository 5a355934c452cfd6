"""Records of files and hub data sets: which kind a row is, by its keys, and whether its values are what it needs."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from upslope.data.messages import at, described, list_of, message_of, text_of, tools_of, train_of
from upslope.data.readers import header_of, rows_of
from upslope.errors import DataError
from upslope.options.common import column_names
from upslope.types import Message, Prompt

Kind = Literal["text", "messages", "prompt", "completion", "preference", "labelled"]
Content = str | tuple[Message, ...]

KEYS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "labelled": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "prompt": ("prompt",),
    "text": ("text",),
}
_ADD = "; add it to every record"
_FOREIGN = {"conversations", "instruction", "input", "output", "system", "history", "tools"}
_KNOWN = {key for keys in KEYS.values() for key in keys} | _FOREIGN
_ACCEPTED = " | ".join(", ".join(keys) for keys in reversed(KEYS.values())) + " | instruction, output | conversations"
_SYNONYMS = {
    "question": "prompt", "query": "prompt", "input": "prompt", "instruction": "prompt", "response": "completion",
    "answer": "completion", "output": "completion", "target": "completion", "content": "text", "document": "text",
    "dialog": "messages", "dialogue": "messages", "conversation": "messages",
}  # fmt: skip

_TURN = "\n\nAssistant:"  # what HH-RLHF's texts write before each reply
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
_SHAREGPT_KEYS = ("from", "value", "train", "weight")
_UNUSED = {
    "system": "make it the first of the messages, or rename the column",
    "history": "write its turns into the messages, or rename the column",
    "functions": "name the column tools",
}
"""Columns that say what a model is to be told, where no kind of record but alpaca's and sharegpt's has a place."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row of training data. `where` names its file and line; `extra` keeps every column its kind does not use.

    prompt, completion, chosen and rejected are each a text or a tuple of messages.
    """

    kind: Kind
    where: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    prompt: Content | None = None
    completion: Content | None = None
    chosen: Content | None = None
    rejected: Content | None = None
    label: bool | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_prompt(self, key: int) -> Prompt:
        """The prompt to sample from, `answer` taken from a column of that name; DataError if the record has none."""
        if self.prompt is None:
            raise DataError(f"{self.where}: a record of kind {self.kind!r} has no 'prompt' to sample from")
        answer = self.extra.get("answer")
        text = self.prompt if isinstance(self.prompt, str) else None
        messages = () if isinstance(self.prompt, str) else self.prompt
        return Prompt(key, messages, text, None if answer is None else str(answer), dict(self.extra))


def read_records(source: str | Path, *, split: str | None = None, columns: Sequence[str] = ()) -> list[Record]:
    """Every record of a data file or hub data set (see `readers.rows_of`), all of one kind.

    columns: what its columns are called, as in prompt=question; see `options.common.column_names`.
    Raises DataError naming the file, the line or row, the key and the remedy: an empty file, bytes that are not UTF-8,
    invalid JSON, unknown or missing keys, null or NaN or wrongly typed values, records of different kinds.
    """
    records: list[Record] = []
    names, first_bare = column_names(columns), False
    for where, row in rows_of(source, split=split, columns=columns):
        record = record_of(row, where)
        for name in names.keys() - KEYS[record.kind]:
            keys = ", ".join(KEYS[record.kind])
            raise DataError(f"{where}: columns names {name}, but the row is read as {keys}; leave it out of --columns")
        bare = record.kind == "preference" and "prompt" not in row
        if records and bare != first_bare:
            raise DataError(f"{where}: 'prompt' is in some rows and not in others; give every row one, or none")
        first_bare = bare
        records.append(record)
        if record.kind != (first := records[0]).kind:
            raise DataError(
                f"{where}: a record of kind {record.kind!r} among {first.kind!r} ones (first at {first.where}); "
                "keep one kind per file"
            )
    if not records:
        raise DataError(f"{source}: holds no records")
    return records


def record_of(row: Mapping[str, Any], where: str) -> Record:
    """The record a row describes.

    Besides the kinds in KEYS it takes alpaca rows ({instruction, input, output}, also system and history: a chat with
    one completion) and sharegpt rows ({conversations: [{from, value}]}). Raises DataError naming `where`, the key and
    the remedy.
    """
    kind = _kind_of({key for key in row if key is not None}, where)
    with at(where):
        tools = tools_of(row.get("tools"))
        if kind == "sharegpt":
            extra = _extra(row, "conversations", "system")
            return Record("messages", where, messages=_sharegpt(row), tools=tools, extra=extra)
        if kind == "alpaca":
            prompt, completion = _alpaca(row)
            extra = _extra(row, "instruction", "input", "output", "system", "history")
            return Record("completion", where, prompt=prompt, completion=completion, tools=tools, extra=extra)
        for key in _UNUSED if kind != "text" else ():
            if row.get(key):
                raise DataError(f"{key!r} beside {KEYS[kind][0]!r} would not be read; {_UNUSED[key]}")
        # without a prompt the sides of a preference begin with it
        values = {key: _VALUES.get(key, _content)(row[key], key) for key in KEYS[kind] if key in row}
        if kind == "preference":
            sides = _split_sides(values.get("prompt"), values["chosen"], values["rejected"])
            values = dict(zip(KEYS[kind], sides, strict=True))
        return Record(kind, where, **values, tools=tools, extra=_extra(row, *KEYS[kind]))


def _kind_of(keys: set[str], where: str) -> Kind | Literal["sharegpt", "alpaca"]:
    if "chosen" in keys or "rejected" in keys:
        return _complete("preference", keys, where)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "completion" in keys:
        return _complete("labelled" if "label" in keys else "completion", keys, where)
    if "instruction" in keys:
        return _complete("alpaca", keys, where)
    found: Literal["prompt", "text"] | None = "prompt" if "prompt" in keys else "text" if "text" in keys else None
    wanted = {None: tuple(sorted(_KNOWN)), "prompt": ("completion", "chosen", "rejected"), "text": ()}[found]
    for key in sorted(keys - _KNOWN):
        if near := difflib.get_close_matches(key, wanted, n=1, cutoff=0.8):
            raise DataError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    if found is None:
        listed = ", ".join(repr(key) for key in sorted(keys)) or "none"
        named = {_SYNONYMS[key]: key for key in sorted(keys) if key in _SYNONYMS}
        given = " ".join(f"{name}={named[name]}" for name in sorted(named, reverse=True)) or "NAME=COLUMN ..."
        remedy = f"rename them, or give --columns {given} (accepted: {_ACCEPTED})"
        raise DataError(f"{header_of(where)}: its keys ({listed}) are no known kind of record; {remedy}")
    return found


def _complete(kind: Kind | Literal["alpaca"], keys: set[str], where: str) -> Kind | Literal["alpaca"]:
    wanted = KEYS[kind] if kind != "alpaca" else ("instruction", "output")
    missing = [key for key in wanted if key not in keys]
    if missing and not (kind == "preference" and missing == ["prompt"] and _suggest("prompt", keys) == _ADD):
        has = ", ".join(repr(key) for key in wanted if key in keys)
        raise DataError(f"{where}: has {has} but no {missing[0]!r}{_suggest(missing[0], keys)}")
    return kind


def _suggest(missing: str, keys: set[str]) -> str:
    others = [key for key in sorted(keys) if key not in _KNOWN or _SYNONYMS.get(key) == missing]
    near = difflib.get_close_matches(missing, others, n=1, cutoff=0.7)
    near = near or [key for key in others if _SYNONYMS.get(key) == missing]
    return f"; did you mean {missing!r} where it says {near[0]!r}?" if near else _ADD


def _extra(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key is not None and key not in used and key != "tools"}


def _content(value: Any, key: str) -> Content:
    return _messages(value, key) if isinstance(value, (list, tuple)) else text_of(value, key)


def _label(value: Any, key: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, int | str) and (word := str(value).strip().lower()) in words:
        return words[word]
    raise DataError(f"{key!r} must be true or false, is {described(value)}")


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    return tuple(message_of(entry, f"{key}[{i}]") for i, entry in enumerate(list_of(value, key, "messages")))


_VALUES: dict[str, Callable[[Any, str], Any]] = {"text": text_of, "messages": _messages, "label": _label}


def _sharegpt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = _system(row)
    for i, entry in enumerate(list_of(row["conversations"], "conversations", "messages")):
        key = f"conversations[{i}]"
        if not isinstance(entry, Mapping):
            raise DataError(f"{key!r} must be an object with from and value, is {described(entry)}")
        if "from" not in entry and "role" in entry:
            messages.append(message_of(entry, key))
            continue
        for name in ("from", "value"):
            if name not in entry:
                raise DataError(f"{key!r} has no {name!r}{_suggest(name, set(map(str, entry)))}")
        if unknown := sorted(str(k) for k, v in entry.items() if v is not None and k not in _SHAREGPT_KEYS):
            raise DataError(f"{key!r} has the unknown key {unknown[0]!r}; accepted: {', '.join(_SHAREGPT_KEYS)}")
        if not isinstance((speaker := entry["from"]), str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(f"'{key}.from' is {described(speaker)}; accepted: {', '.join(_SHAREGPT_ROLES)}")
        content = text_of(entry["value"], f"{key}.value", empty=True)
        messages.append(Message(_SHAREGPT_ROLES[speaker], content, train=train_of(entry, key)))
    return tuple(messages)


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [Message("system", text_of(row["system"], "system"))] if row.get("system") else []


def _alpaca(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    turns, history = _system(row), row.get("history")
    for i, pair in enumerate(list_of(history, "history", "messages") if history else ()):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise DataError(f"'history[{i}]' must be a pair [instruction, answer], is {described(pair)}")
        turns.append(Message("user", text_of(pair[0], f"history[{i}][0]")))
        turns.append(Message("assistant", text_of(pair[1], f"history[{i}][1]")))
    asked = ("instruction", "input") if row.get("input") else ("instruction",)
    turns.append(Message("user", "\n".join(text_of(row[key], key) for key in asked)))
    return tuple(turns), (Message("assistant", text_of(row["output"], "output")),)


def _split_sides(prompt: Content | None, chosen: Content, rejected: Content) -> tuple[Content, ...]:
    """Prompt, chosen and rejected of a row, what the sides have in common moved into the prompt.

    prompt: None where the row has none; a text, which conversations then hold as a user's turn. Sides that do not
    repeat the prompt stay as they are. Of conversations the prompt is their longest common beginning before the last
    reply; of texts it ends with the last "Assistant:" of their common beginning, else before its last word.
    DataError: nothing in common, nothing that differs, another prompt than the row's.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _of_texts(chosen, rejected)
        if isinstance(prompt, str) and all(side.startswith(prompt) and side != prompt for side in (chosen, rejected)):
            return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)
        return prompt, chosen, rejected
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            return prompt, chosen, rejected
        raise DataError("one of 'chosen' and 'rejected' is a text, the other messages: make both the same")
    if isinstance(prompt, tuple) and not (chosen[: len(prompt)] == prompt == rejected[: len(prompt)]):
        return prompt, chosen, rejected
    most = min(len(chosen), len(rejected)) - 1
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:most], rejected, strict=False)))
    if isinstance(prompt, str) and common == 0 and chosen[0].role == rejected[0].role == "assistant":
        return (Message("user", prompt),), chosen, rejected
    if common and chosen[common] == rejected[common]:
        raise DataError("'chosen' and 'rejected' differ in no reply, one begins with the other; drop the row")
    head = chosen[:common]
    if isinstance(prompt, str) and not any(m.role == "user" and m.content.strip() == prompt.strip() for m in head):
        raise DataError("'prompt' is none of the user's turns with which 'chosen' and 'rejected' begin")
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not common or side[common].role != "assistant":
            what = f"'{key}[{common}]' is a turn of the {side[common].role}" if common else "nothing of them is alike"
            raise DataError(f"'chosen' and 'rejected' must be alike up to a reply, but {what}; give a prompt")
    return head, chosen[common:], rejected[common:]


def _of_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    common = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    end = common.rfind(_TURN)
    cut = end + len(_TURN) if end >= 0 else len(common[: max(common.rfind(" "), common.rfind("\n"))].rstrip())
    if chosen == rejected or not common[:cut].strip():
        what = "are the same" if chosen == rejected else "have no beginning in common that could be the prompt"
        raise DataError(f"'chosen' and 'rejected' {what}; give a prompt of its own, or drop the row")
    return chosen[:cut], chosen[cut:], rejected[cut:]
