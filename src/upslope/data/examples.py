"""Records to training sequences: answers to imitate, the better one of two, one that is good or bad, or right in steps.

Of answers that are compared or judged, every sequence ends with the token that ends the turn (EOS): a reward is read
there, and a sampled completion ends there too. What does not fit max_length is left out whole, pair by pair, and
counted; nothing is ever cut.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from upslope.data.chat import TooLongError, check_length, encode_completion, encode_conversation, encode_document
from upslope.data.messages import at, finite, list_of, text_of
from upslope.data.pieces import FastTokenizer
from upslope.data.records import KEYS, Content, Kind, Record
from upslope.errors import DataError
from upslope.types import Example

Row = TypeVar("Row")
STEP_END = "\n"
"""What separates the steps of a solution: a step ends with the token that holds it, the last one with EOS."""


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """Examples with the account of what became of every record.

    `kept[i]` is the index of the record behind `examples[i]`; `too_long` lists the records (index, tokens) left out.
    """

    examples: list[Example]
    kept: list[int]
    too_long: list[tuple[int, int]]


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


@dataclass(frozen=True, slots=True)
class Encoded(Generic[Row]):
    """The rows that fit, and the number of tokens of each one left out for its length."""

    rows: list[Row]
    too_long: list[int]


def example_of(record: Record, tokenizer: FastTokenizer, *, max_length: int | None) -> Example:
    """The training sequence of a text, messages or prompt-and-completion record.

    Text: every token, EOS appended. Prompt and completion: the completion with its EOS or end-of-turn token. Messages:
    the assistant's turns. Raises DataError naming the record for other kinds and whatever the template refuses;
    TooLongError for a sequence of more than `max_length` tokens, which is never cut.
    """
    given: dict[str, Any] = {"max_length": max_length, "tools": record.tools}
    with at(record.where):
        if record.text is not None:
            return encode_document(tokenizer, record.text, **given)
        if record.messages:
            return encode_conversation(tokenizer, record.messages, **given)
        if record.kind == "completion" and record.prompt is not None and record.completion is not None:
            return encode_completion(tokenizer, record.prompt, record.completion, **given)
        raise DataError(
            f"a record of kind {record.kind!r} is nothing to imitate; supervised learning takes text, messages, or "
            "prompt and completion"
        )


def examples_of(records: Iterable[Record], tokenizer: FastTokenizer, *, max_length: int | None) -> EncodedRecords:
    """The examples of all records, in order, and those left out for their length. DataError: no record remains."""
    rows, lost = fitting(records, lambda _, record: example_of(record, tokenizer, max_length=max_length), max_length)
    return EncodedRecords(list(rows.values()), list(rows), lost)


def fitting(
    records: Iterable[Record], encode: Callable[[int, Record], Row], max_length: int | None
) -> tuple[dict[int, Row], list[tuple[int, int]]]:
    """What `encode` makes of the records that fit, by index, and (index, tokens) of those left out for their length.

    DataError, naming the record: what `encode` says, or that no record remains.
    """
    rows: dict[int, Row] = {}
    lost: list[tuple[int, int]] = []
    first = ""
    for index, record in enumerate(records):
        first = first or record.where
        try:
            with at(record.where):
                rows[index] = encode(index, record)
        except TooLongError as error:
            lost.append((index, error.length))
    if lost and not rows:
        raise DataError(
            f"{first}: none of {len(lost)} records fits max_length {max_length}: the shortest has "
            f"{min(length for _, length in lost)} tokens; shorten them or raise max_length"
        )
    if not rows:
        raise DataError("there are no records to train on")
    return rows, lost


def answer(
    tokenizer: FastTokenizer,
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
    check_length(end, max_length)
    return Example(example.tokens[:end], example.mask[:end])


def pairs_of(records: Sequence[Record], tokenizer: FastTokenizer, *, max_length: int | None) -> Encoded[Pair]:
    """Preference pairs. DataError naming the row: another kind, equal sides, a margin that is no number."""

    def encode(_: int, record: Record) -> Pair:
        prompt, *both = _values(record, "preference", "chosen and rejected (prompt may be left out)")
        for key in ("chosen", "rejected"):
            _check_not_empty(record, key)
        if _text(both[0]) == _text(both[1]):
            raise DataError("'chosen' and 'rejected' are the same; drop the row")
        sides = [answer(tokenizer, prompt, side, max_length=None, tools=record.tools) for side in both]
        # the length that counts is that of the longer one, whichever side it is
        check_length(max(len(side.tokens) for side in sides), max_length)
        return Pair(*sides, record.where, _margin(record))

    return _encoded(records, encode, max_length)


def judged_of(records: Sequence[Record], tokenizer: FastTokenizer, *, max_length: int | None) -> Encoded[Judged]:
    """Labelled answers, each with the mismatched one: its prompt and the answer of the next row of another prompt.

    DataError naming the row: another kind, or all labels alike, or all prompts alike.
    """
    for record in records:
        with at(record.where):
            _values(record, "labelled", "prompt, completion, label")
            _check_not_empty(record, "completion")
    if len({record.label for record in records}) < 2:
        label, where = str(records[0].label).lower(), records[0].where
        raise DataError(f"{where}: every row has label {label}; kto learns from both good and bad answers: add some")

    def encode(index: int, record: Record) -> Judged:
        prompt, completion, label = _values(record, "labelled", "prompt, completion, label")
        example = answer(tokenizer, prompt, completion, max_length=max_length, tools=record.tools)
        return Judged(example, _mismatched(records, index, tokenizer, max_length), label, record.where)

    return _encoded(records, encode, max_length)


def solutions_of(records: Sequence[Record], tokenizer: FastTokenizer, *, max_length: int | None) -> Encoded[Solution]:
    """Rows {prompt, steps, labels}: one label from 0 to 1 per step (the share of right continuations, or 0 and 1).

    The answer is the steps with a newline between them. DataError naming the row: steps and labels of different
    number, a step that is empty or holds a newline, a label outside [0, 1].
    """

    def encode(_: int, record: Record) -> Solution:
        if record.prompt is None:
            _values(record, "prompt", "prompt, steps, labels")
        steps, labels = _steps(record), _labels(record)
        if len(steps) != len(labels):
            raise DataError(f"{len(steps)} steps but {len(labels)} labels; give every step exactly one label")
        example = answer(tokenizer, record.prompt, STEP_END.join(steps), max_length=max_length, tools=record.tools)
        first = example.mask.index(True)
        if len(ends := step_ends(example.tokens[first:], tokenizer)) != len(steps):
            raise DataError(
                f"this tokenizer shows {len(ends)} step ends in {len(steps)} steps; is every step "
                "a line of text of its own?"
            )
        labelled = dict(zip(ends, labels, strict=True))
        values = [labelled.get(place, math.nan) for place in range(len(example.tokens) - first)]
        return Solution(example, values, record.where)

    return _encoded(records, encode, max_length)


def step_ends(tokens: Sequence[int], tokenizer: FastTokenizer) -> list[int]:
    """Places in a completion's `tokens` at which a step ends: tokens with a newline, and the last token.

    A line of white space is no step, so neither blank lines nor a newline before EOS count twice. A pure function of
    the tokens, the same for data and for what was sampled.
    """
    plain = set(tokens).difference(tokenizer.all_special_ids)
    pieces = {t: str(tokenizer.decode([t], clean_up_tokenization_spaces=False)) for t in plain}
    ends: list[int] = []
    filled = False
    for place, token in enumerate(tokens):
        before, newline, after = pieces.get(token, "").partition(STEP_END)
        filled = filled or bool(before.strip())
        if newline:
            ends += [place] * filled
            filled = bool(after.strip())
    return [*ends, len(tokens) - 1] if filled else ends


def _encoded(records: Sequence[Record], encode: Callable[[int, Record], Row], max_length: int | None) -> Encoded[Row]:
    rows, lost = fitting(records, encode, max_length)
    return Encoded(list(rows.values()), [length for _, length in lost])


def _values(record: Record, kind: Kind, keys: str) -> list[Any]:
    """What a record of that kind holds, in the order of KEYS. DataError for one of another kind."""
    values = [getattr(record, key) for key in KEYS[kind]]
    if record.kind != kind or None in values:
        raise DataError(f"a record of kind {record.kind!r}; this needs the keys {keys}")
    return values


def _check_not_empty(record: Record, key: str) -> None:
    if not _text(getattr(record, key)).strip():
        raise DataError(f"{key!r} is empty; fill it in or drop the row")


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(m.content + (json.dumps([dict(c) for c in m.tool_calls]) if m.tool_calls else "") for m in content)


def _mismatched(records: Sequence[Record], index: int, tokenizer: FastTokenizer, max_length: int | None) -> Example:
    """The prompt of a row with the answer of the next row that has another prompt and fits."""
    refused = DataError("every row has this prompt; kto compares it with answers to other prompts")
    record = records[index]
    for other in (*records[index + 1 :], *records[:index]):
        same_form = isinstance(other.prompt, str) == isinstance(record.prompt, str)
        if same_form and _text(other.prompt) != _text(record.prompt) and other.completion is not None:
            try:
                return answer(tokenizer, record.prompt, other.completion, max_length=max_length, tools=record.tools)
            except TooLongError as error:
                refused = error
    raise refused


def _margin(record: Record) -> float | None:
    if (value := record.extra.get("margin")) in (None, ""):
        return None
    if (number := finite(value)) is None:
        raise DataError(f"'margin' must be a finite number, is {value!r:.40}")
    return number


def _per_step(record: Record, key: str) -> Sequence[Any]:
    if record.extra.get(key) is None:
        raise DataError(f"{key!r} is missing; a process reward model needs the keys prompt, steps, labels")
    return list_of(record.extra[key], key, "entries, one per step (a process reward model: keys prompt, steps, labels)")


def _steps(record: Record) -> Sequence[str]:
    steps = _per_step(record, "steps")
    for i, step in enumerate(steps):
        if not text_of(step, f"steps[{i}]").strip():
            raise DataError(f"'steps[{i}]' is empty; fill it in or drop the record")
        if STEP_END in step:
            raise DataError(f"'steps[{i}]' holds a newline, which ends a step; split it or join its lines")
    return steps


def _labels(record: Record) -> list[float]:
    labels = []
    for i, label in enumerate(_per_step(record, "labels")):
        if (number := finite(label)) is None or not 0 <= number <= 1:
            raise DataError(f"'labels[{i}]' must be true, false or a number from 0 to 1, is {label!r:.40}")
        labels.append(number)
    return labels
