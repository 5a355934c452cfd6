"""Labelled rows: a label per text (CSV, JSONL, Parquet, hub), or a tag per word (CoNLL columns).

Nothing is skipped, guessed or repaired: what is wrong is one DataError with the file and the line. Free of torch.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

from upslope.config import suggestion
from upslope.data.messages import at, finite
from upslope.data.readers import header_of, json_of, rows_of, text_of
from upslope.errors import DataError

Scheme = Literal["iob2", "iob1", "none"]


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of texts, and its label; `where` names file and line."""

    text: str
    label: str
    pair: str | None = None
    where: str = ""

    @property
    def content(self) -> str:
        """What makes two rows the same input."""
        return self.text if self.pair is None else f"{self.text}\0{self.pair}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Its label."""
        return (self.label,)


@dataclass(frozen=True, slots=True)
class TaggedSentence:
    """Words and one tag for each; `where` names file and first line."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    where: str = ""

    @property
    def content(self) -> str:
        """What makes two sentences the same input."""
        return "\0".join(self.words)

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags."""
        return self.tags


Labelled = TypeVar("Labelled", LabelledText, TaggedSentence)


def read_labelled(
    source: str | Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    pair_column: str | None = None,
    numbers: bool = False,
    columns: Sequence[str] = (),
) -> list[LabelledText]:
    """The rows of a file or hub data set (`readers.rows_of`); labels that are integers or booleans become their text.

    `pair_column` names a second text (a hypothesis after its premise). `numbers`: every label must be a number.
    DataError names file, line and remedy: a column that is not there, an empty text, an empty label, a value of
    another type, no rows.
    """
    rows: list[LabelledText] = []
    named = {text_column: "text_column", pair_column: "pair_column", label_column: "label_column"}
    for where, row in rows_of(source, columns=columns):
        for column, option in named.items():
            if column is not None and column not in row:
                near = difflib.get_close_matches(column, list(row), n=1)
                hint = f"did you mean {near[0]!r}? set {option}" if near else f"set {option}"
                there = f"no column {column!r} (it has {', '.join(row)})"
                raise DataError(f"{header_of(where)}: {there}; {hint} to its name")
        with at(where):
            text = filled_text(row[text_column], text_column)
            pair = None if pair_column is None else filled_text(row[pair_column], pair_column)
            label = (_number if numbers else _label)(row[label_column], label_column)
        rows.append(LabelledText(text, label, pair, where))
    if not rows:
        raise DataError(f"{source}: holds no rows")
    return rows


def read_conll(
    path: str | Path, *, token_column: int = 0, tag_column: int = -1, scheme: Scheme = "iob2"
) -> list[TaggedSentence]:
    """Sentences of a file in columns: one word a line, a blank line between sentences.

    Columns are separated by tabs where a line has a tab, else by spaces; a negative column counts from the last.
    Lines that start with -DOCSTART- are skipped. scheme: "iob2" checks that each I-X follows B-X or I-X; "iob1"
    (B-X only between two entities of one type) is checked and turned into iob2; "none" takes any tags. DataError names
    file, line and remedy: rows of different widths, a column that is not there, an empty cell, a bad tag, no sentence.
    """
    if not (path := Path(path).expanduser()).is_file():
        raise DataError(f"{path}: no such file")
    sentences: list[TaggedSentence] = []
    for within, lines in groupby(_conll_rows(path), lambda row: bool(row[1])):
        if within:
            words: list[str] = []
            tags = ["O"]
            place = ""
            for where, cells in lines:
                place = place or where
                with at(where):
                    words.append(_cell(cells, token_column, "token_column"))
                    tags.append(_checked_tag(_cell(cells, tag_column, "tag_column"), tags[-1], scheme))
            sentences.append(TaggedSentence(tuple(words), tuple(tags[1:]), place))
    if not sentences:
        raise DataError(f"{path}: holds no sentences")
    return sentences


def _conll_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every line's place and its cells; none of a line between sentences."""
    width, first = 0, 0
    for number, line in enumerate(text_of(path).split("\n"), 1):
        where, line = f"{path}:{number}", line.rstrip("\r")
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else [c for c in line.split(" ") if c]
        if not line.strip() or line.startswith("-DOCSTART-"):
            cells = []
        elif not width:
            width, first = len(cells), number
        elif len(cells) != width:
            raise DataError(
                f"{where}: {len(cells)} columns, line {first} has {width}; every word needs the same columns"
            )
        yield where, cells


def _cell(cells: Sequence[str], column: int, name: str) -> str:
    if not -len(cells) <= column < len(cells):
        raise DataError(f"no column {column} ({name}), the line has {len(cells)}")
    if not cells[column]:
        raise DataError(f"column {column} ({name}) is empty")
    return cells[column]


def _checked_tag(tag: str, before: str, scheme: Scheme) -> str:
    """The tag in iob2; `before` is the previous word's, in iob2."""
    if scheme == "none" or tag == "O":
        return tag
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I") or not dash or not kind:
        raise DataError(f"tag {tag!r} is not O, B-TYPE or I-TYPE; tags of another kind need tag_scheme = none")
    inside = before != "O" and before.partition("-")[2] == kind
    if prefix == "I" and not inside:
        if scheme == "iob1":
            return f"B-{kind}"
        raise DataError(
            f"tag {tag!r} follows {before!r}, but in IOB2 an entity begins with B-{kind}; "
            "if the file is IOB1 set tag_scheme = iob1"
        )
    if scheme == "iob1" and prefix == "B" and not inside:
        raise DataError(
            f"tag {tag!r} follows {before!r}, but in IOB1 B- stands only between two entities of one type; "
            "if the file is IOB2 set tag_scheme = iob2"
        )
    return tag


def labels_of(rows: Sequence[LabelledText] | Sequence[TaggedSentence], source: str) -> tuple[str, ...]:
    """The sorted labels (or tags) of the training rows. DataError: fewer than two."""
    if len(found := sorted({label for row in rows for label in row.labels})) < 2:
        raise DataError(f"{source}: all {len(rows)} rows carry the label {found[0]!r}; there is nothing to tell apart")
    return tuple(found)


def check_known(rows: Sequence[LabelledText] | Sequence[TaggedSentence], labels: Sequence[str]) -> None:
    """DataError for the first row with a label that training does not have."""
    known = set(labels)
    for row in rows:
        if unknown := [label for label in row.labels if label not in known]:
            raise DataError(
                f"{row.where}: label {unknown[0]!r} does not occur in the training data"
                f"{suggestion(unknown[0], labels)}; correct the row, leave it out, or give training rows of that label"
            )


def split_by_content(
    rows: Sequence[LabelledText], *, share: float, seed: int
) -> tuple[list[LabelledText], list[LabelledText]]:
    """(training, held-out) rows: of each label about `share`, chosen by a hash of seed and content.

    Rows of one content stay together, whatever their labels, and a row's side does not depend on the order of the
    file. Every label keeps a training row. DataError: nothing to hold out.
    """
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row.content, set()).add(row.label)
    groups: dict[str, list[str]] = {}
    ordered = sorted(labels, key=lambda c: _hash(c, seed))
    for content in ordered:
        groups.setdefault(min(labels[content]), []).append(content)
    few = f"{len(rows)} rows have {len(labels)} different texts: too few to hold some out; give eval_data or more"
    return _split(rows, groups.values(), [(content, labels[content]) for content in ordered], share, few)


def split_sentences(
    rows: Sequence[TaggedSentence], *, share: float, seed: int
) -> tuple[list[TaggedSentence], list[TaggedSentence]]:
    """(training, held-out) sentences by a hash of seed and content; equal sentences stay together.

    A tag that would be left without a training sentence takes its first held-out one back. DataError: too few.
    """
    contents = sorted({row.content for row in rows}, key=lambda c: _hash(c, seed))
    few = f"{len(rows)} sentences are too few to hold some out; give eval_data or more rows"
    return _split(rows, [contents], [(row.content, set(row.tags)) for row in rows], share, few)


def _split(
    rows: Sequence[Labelled],
    groups: Iterable[list[str]],
    ordered: Sequence[tuple[str, set[str]]],
    share: float,
    few: str,
) -> tuple[list[Labelled], list[Labelled]]:
    """Hold out the first `share` of each group of contents; the first in order whose labels training lacks go back."""
    held: set[str] = set()
    for contents in groups:
        held.update(contents[: min(len(contents) - 1, max(1, round(share * len(contents))))])
    kept = {label for content, labels in ordered if content not in held for label in labels}
    for content, labels in ordered:
        if content in held and not labels <= kept:
            held.discard(content)
            kept |= labels
    if not held:
        raise DataError(few)
    return [r for r in rows if r.content not in held], [r for r in rows if r.content in held]


def stratified_choice(rows: Sequence[LabelledText], *, per_label: int, seed: int) -> list[LabelledText]:
    """At most `per_label` different texts of each label, by a hash of seed and content, in the order of the rows."""
    taken: Counter[str] = Counter()
    chosen: dict[str, LabelledText] = {}
    for row in shuffled_by_content(rows, seed=seed):
        if taken[row.label] < per_label and row.content not in chosen:
            taken[row.label] += 1
            chosen[row.content] = row
    return [row for row in rows if chosen.get(row.content) is row]


def shuffled_by_content(rows: Sequence[Any], *, seed: int) -> list[Any]:
    """The rows in the order of a hash of seed and content; equal contents in the order of the file."""
    return sorted(rows, key=lambda row: _hash(row.content, seed))


def read_rewards(path: str | Path, labels: Sequence[str]) -> list[list[float]]:
    """The reward of saying column's label where row's label is right, [C, C] in the order of `labels`.

    A JSON object {right label: {said label: reward}}; what is not named is 1 for the right label and 0 for another.
    DataError names the file and the key: an unknown label, a reward that is not a finite number.
    """
    table = json_of(text_of(Path(path).expanduser()), str(path))
    if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
        raise DataError(f'{path}: must be an object of objects, {{"right label": {{"said label": reward}}}}')
    rewards = {right: {said: float(right == said) for said in labels} for right in labels}
    for right, row in table.items():
        if unknown := [label for label in (right, *row) if label not in rewards]:
            hint = suggestion(unknown[0], labels)
            raise DataError(f"{path}: label {unknown[0]!r} does not occur in the training data{hint}")
        for said, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                raise DataError(f"{path}: the reward of {said!r} where {right!r} is right is {value!r}, not a number")
            rewards[right][said] = float(value)
    return [list(row.values()) for row in rewards.values()]


def filled_text(value: Any, column: str, *, blank: bool = False) -> str:
    """A cell that holds a text; not an empty one, unless it may be blank."""
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r:.60}, not a text")
    if not value.strip() and not blank:
        raise DataError(f"{column} is empty; fill it in or remove the row")
    return value


def _label(value: Any, column: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{column} is empty; every row needs a label")
    if not isinstance(value, str | int):
        raise DataError(f"{column} is {value!r}; a label is a text or an integer")
    return str(value).strip()


def _number(value: Any, column: str) -> str:
    if (number := None if isinstance(value, bool) else finite(value)) is None:
        raise DataError(f"{column} is {value!r:.60}; squared_error needs a finite number in every row")
    return repr(number)


def _hash(content: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{content}".encode()).digest()


def count_copies(rows: Sequence[Any], others: Sequence[Any]) -> int:
    """How many of `rows` have a content that also stands in `others`."""
    known = {row.content for row in others}
    return sum(row.content in known for row in rows)
