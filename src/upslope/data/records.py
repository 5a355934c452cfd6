"""Records from files and hub data sets, and the training examples of those that supervised learning takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from upslope.data.chat import TooLongError, encode_completion, encode_conversation, encode_document
from upslope.data.kinds import KEYS, Content, Kind, Record, record_of
from upslope.data.readers import rows_of
from upslope.errors import DataError
from upslope.options.common import column_names
from upslope.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KEYS",
    "Content",
    "EncodedRecords",
    "Kind",
    "Record",
    "example_of",
    "examples_of",
    "read_records",
    "record_of",
]


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """Examples with the account of what became of every record.

    `kept[i]` is the index of the record behind `examples[i]`; `too_long` lists the records (index, tokens) left out.
    """

    examples: list[Example]
    kept: list[int]
    too_long: list[tuple[int, int]] = field(default_factory=list)


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
        if records and record.kind != records[0].kind:
            first = records[0]
            raise DataError(
                f"{where}: a record of kind {record.kind!r} among {first.kind!r} ones (first at {first.where}); "
                "keep one kind per file"
            )
        records.append(record)
    if not records:
        raise DataError(f"{source}: holds no records")
    return records


def example_of(record: Record, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Example:
    """The training sequence of a text, messages or prompt-and-completion record.

    Text: every token, EOS appended. Prompt and completion: the completion with its EOS or end-of-turn token. Messages:
    the assistant's turns. Raises DataError naming the record for other kinds and whatever the template refuses;
    TooLongError for a sequence of more than `max_length` tokens, which is never cut.
    """
    try:
        if record.text is not None:
            return encode_document(tokenizer, record.text, max_length=max_length, tools=record.tools)
        if record.messages:
            return encode_conversation(tokenizer, record.messages, max_length=max_length, tools=record.tools)
        if record.kind == "completion" and record.prompt is not None and record.completion is not None:
            return encode_completion(
                tokenizer, record.prompt, record.completion, max_length=max_length, tools=record.tools
            )
    except TooLongError:
        raise
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from error
    raise DataError(
        f"{record.where}: a record of kind {record.kind!r} is nothing to imitate; supervised learning takes text, "
        "messages, or prompt and completion"
    )


def examples_of(
    records: Sequence[Record] | Iterable[Record], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> EncodedRecords:
    """The examples of all records, in order, and those left out for their length. DataError: no record remains."""
    encoded, first = EncodedRecords([], []), ""
    for index, record in enumerate(records):
        first = first or record.where
        try:
            example = example_of(record, tokenizer, max_length=max_length)
        except TooLongError as error:
            encoded.too_long.append((index, error.length))
            continue
        encoded.examples.append(example)
        encoded.kept.append(index)
    if not encoded.examples:
        shortest = min((length for _, length in encoded.too_long), default=0)
        if not encoded.too_long:
            raise DataError("there are no records to train on")
        raise DataError(
            f"{first}: none of {len(encoded.too_long)} records fits max_length {max_length}: the shortest has "
            f"{shortest} tokens; shorten them or raise max_length"
        )
    return encoded
