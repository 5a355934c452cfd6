"""Records that say which of two answers is better, whether an answer is good, or which steps of it are right.

Every sequence ends with the token that ends the turn (EOS): a reward is read there, and a sampled completion ends
there too. What does not fit max_length is left out whole, pair by pair, and counted; nothing is ever cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic

from upslope.data.chat import TooLongError, encode_completion
from upslope.data.messages import finite, list_of, text_of
from upslope.data.records import Content, Record, Row, fitting
from upslope.errors import DataError
from upslope.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_END = "\n"
"""What separates the steps of a solution: a step ends with the token that holds it, the last one with EOS."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first; `margin` is the row's own (0 where it has none)."""

    chosen: Example
    rejected: Example
    where: str
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer with its label, and the same prompt with an answer to another one (KTO's mismatched pair)."""

    example: Example
    mismatched: Example
    desirable: bool
    where: str


@dataclass(frozen=True, slots=True)
class Solution:
    """An answer in steps; `labels` holds for every trained token the label of the step it ends, NaN elsewhere."""

    example: Example
    labels: list[float]
    where: str


@dataclass(slots=True)
class Encoded(Generic[Row]):
    """The rows that fit, and the number of tokens of each one left out for its length."""

    rows: list[Row] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)


def answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Content,
    completion: Content,
    *,
    max_length: int | None,
    tools: Sequence[Any] = (),
) -> Example:
    """The sequence of a prompt and an answer up to the token that ends the turn, which is its last one.

    A template's white space after that token is left off: no sampled completion has it.
    """
    example = encode_completion(tokenizer, prompt, completion, tools=tools)
    end = max(t for t, trained in enumerate(example.mask) if trained) + 1
    if max_length is not None and end > max_length:
        raise TooLongError(end, max_length)
    return Example(example.tokens[:end], example.mask[:end])


def pairs_of(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Encoded[Pair]:
    """Preference pairs. DataError naming the row: another kind, equal sides, a margin that is no number."""

    def encode(_: int, record: Record) -> Pair:
        _check_kind(record, "preference", "chosen and rejected (prompt may be left out)")
        assert record.prompt is not None
        assert record.chosen is not None
        assert record.rejected is not None
        for key in ("chosen", "rejected"):
            _check_not_empty(record, key)
        if _text(record.chosen) == _text(record.rejected):
            raise DataError(f"{record.where}: 'chosen' and 'rejected' are the same; drop the row")
        # the length that counts is that of the longer one, whichever side it is
        sides = [
            answer(tokenizer, record.prompt, side, max_length=None, tools=record.tools)
            for side in (record.chosen, record.rejected)
        ]
        longest = max(len(side.tokens) for side in sides)
        if max_length is not None and longest > max_length:
            raise TooLongError(longest, max_length)
        return Pair(sides[0], sides[1], record.where, _margin(record))

    return _encoded(records, encode, max_length)


def judged_of(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Encoded[Judged]:
    """Labelled answers, each with the mismatched one: its prompt and the answer of the next row of another prompt.

    DataError naming the row: another kind, or all labels alike, or all prompts alike.
    """
    for record in records:
        _check_kind(record, "labelled", "prompt, completion, label")
        _check_not_empty(record, "completion")
    if len({record.label for record in records}) < 2:
        label, where = str(records[0].label).lower(), records[0].where
        raise DataError(f"{where}: every row has label {label}; kto learns from both good and bad answers: add some")

    def encode(index: int, record: Record) -> Judged:
        assert record.prompt is not None
        assert record.completion is not None
        assert record.label is not None
        example = answer(tokenizer, record.prompt, record.completion, max_length=max_length, tools=record.tools)
        mismatched = _mismatched(records, index, tokenizer, max_length)
        return Judged(example, mismatched, record.label, record.where)

    return _encoded(records, encode, max_length)


def solutions_of(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> Encoded[Solution]:
    """Rows {prompt, steps, labels}: one label from 0 to 1 per step (the share of right continuations, or 0 and 1).

    The answer is the steps with a newline between them. DataError naming the row: steps and labels of different
    number, a step that is empty or holds a newline, a label outside [0, 1].
    """

    def encode(_: int, record: Record) -> Solution:
        if record.prompt is None:
            _check_kind(record, "prompt", "prompt, steps, labels")
        steps, labels = _steps(record), _labels(record)
        if len(steps) != len(labels):
            raise DataError(
                f"{record.where}: {len(steps)} steps but {len(labels)} labels; give every step exactly one label"
            )
        assert record.prompt is not None
        example = answer(tokenizer, record.prompt, STEP_END.join(steps), max_length=max_length, tools=record.tools)
        first = example.mask.index(True)
        ends = step_ends(example.tokens[first:], tokenizer)
        if len(ends) != len(steps):
            raise DataError(
                f"{record.where}: this tokenizer shows {len(ends)} step ends in {len(steps)} steps; is every step "
                "a line of text of its own?"
            )
        values = [math.nan] * (len(example.tokens) - first)
        for end, label in zip(ends, labels, strict=True):
            values[end] = label
        return Solution(example, values, record.where)

    return _encoded(records, encode, max_length)


def step_ends(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Places in a completion's `tokens` at which a step ends: tokens with a newline, and the last token.

    A line of white space is no step, so neither blank lines nor a newline before EOS count twice. A pure function of
    the tokens, the same for data and for what was sampled.
    """
    special = set(tokenizer.all_special_ids)
    pieces = {
        t: "" if t in special else str(tokenizer.decode([t], clean_up_tokenization_spaces=False)) for t in set(tokens)
    }
    ends: list[int] = []
    filled = False
    for place, token in enumerate(tokens):
        before, newline, after = pieces[token].partition(STEP_END)
        filled = filled or bool(before.strip())
        if newline:
            if filled:
                ends.append(place)
            filled = bool(after.strip())
    return [*ends, len(tokens) - 1] if filled else ends


def _encoded(records: Sequence[Record], encode: Callable[[int, Record], Row], max_length: int | None) -> Encoded[Row]:
    rows, lost = fitting(records, encode, max_length)
    return Encoded(list(rows.values()), [length for _, length in lost])


def _check_kind(record: Record, kind: str, keys: str) -> None:
    if record.kind != kind:
        raise DataError(f"{record.where}: a record of kind {record.kind!r}; this needs the keys {keys}")


def _check_not_empty(record: Record, key: str) -> None:
    value = getattr(record, key)
    if not _text(value).strip():
        raise DataError(f"{record.where}: {key!r} is empty; fill it in or drop the row")


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(m.content + (json.dumps([dict(c) for c in m.tool_calls]) if m.tool_calls else "") for m in content)


def _mismatched(
    records: Sequence[Record], index: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Example:
    """The prompt of a row with the answer of the next row that has another prompt and fits."""
    record = records[index]
    assert record.prompt is not None
    refused: TooLongError | None = None
    for other in (records[(index + k) % len(records)] for k in range(1, len(records))):
        same_form = isinstance(other.prompt, str) == isinstance(record.prompt, str)
        if not same_form or _text(other.prompt) == _text(record.prompt) or other.completion is None:
            continue
        try:
            return answer(tokenizer, record.prompt, other.completion, max_length=max_length, tools=record.tools)
        except TooLongError as error:
            refused = error
    if refused is not None:
        raise refused
    raise DataError(f"{record.where}: every row has this prompt; kto compares it with answers to other prompts")


def _margin(record: Record) -> float | None:
    value = record.extra.get("margin")
    if value is None or value == "":
        return None
    number = finite(value)
    if number is None:
        raise DataError(f"{record.where}: 'margin' must be a finite number, is {value!r:.40}")
    return number


def _per_step(record: Record, key: str) -> Sequence[Any]:
    if record.extra.get(key) is None:
        raise DataError(
            f"{record.where}: {key!r} is missing; a process reward model needs the keys prompt, steps, labels"
        )
    return list_of(record.extra[key], key, record.where, "an entry per step")


def _steps(record: Record) -> Sequence[str]:
    steps = _per_step(record, "steps")
    for i, step in enumerate(steps):
        if not text_of(step, f"steps[{i}]", record.where).strip():
            raise DataError(f"{record.where}: 'steps[{i}]' is empty; fill it in or drop the record")
        if STEP_END in step:
            raise DataError(
                f"{record.where}: 'steps[{i}]' holds a newline, which ends a step; split it or join its lines"
            )
    return steps


def _labels(record: Record) -> list[float]:
    labels = []
    for i, label in enumerate(_per_step(record, "labels")):
        number = finite(label)
        if number is None or not 0 <= number <= 1:
            raise DataError(
                f"{record.where}: 'labels[{i}]' must be true, false or a number from 0 to 1, is {label!r:.40}"
            )
        labels.append(number)
    return labels
