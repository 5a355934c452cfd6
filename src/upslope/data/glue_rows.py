"""One row of a GLUE or SuperGLUE task, flat or nested, to the items it holds. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upslope.config import suggestion
from upslope.data.readers import Row
from upslope.errors import DataError

__all__ = [
    "Form",
    "Item",
    "choices_of_copa",
    "flat",
    "items_of_multirc",
    "items_of_record",
    "label_of",
    "marked_wsc",
    "with_word",
]


@dataclass(frozen=True, slots=True)
class Item:
    """One row: its texts by name, its label by name (a number for stsb), and where it stands.

    group: items of one question belong together (multirc). choices and answers: of the multiple-choice tasks.
    """

    fields: Mapping[str, str]
    label: str
    where: str
    group: str = ""
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Form:
    """How the rows of a task look.

    fields: each text and the columns it may stand in; label: the columns of the label; labels: their names in the
    order of the hub's numbers (none: the label is a number from 0 to 5); text: what an encoder reads, one text or two,
    made of the fields (none for a task that only likelihoods can answer); header: of a file that has none; part: what
    the names of its validation and test splits end with; blank: texts may be empty; items: what makes items of a row.
    """

    fields: Mapping[str, tuple[str, ...]]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    text: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    part: str = ""
    blank: bool = False
    items: Callable[[Form, Row], Iterator[Item]] = lambda form, row: flat(form, row)
    name: str = ""

    @property
    def graded(self) -> bool:
        """Whether the label is a number and no name."""
        return bool(self.label) and not self.labels


def flat(form: Form, row: Row) -> Iterator[Item]:
    """The one item of a row with a column per text."""
    where, values = row
    fields = {name: _text(form, values, columns, where) for name, columns in form.fields.items()}
    yield Item(fields, label_of(form, values, where), where)


def with_word(form: Form, row: Row) -> Iterator[Item]:
    """A wic row: start1 and end1 say where its word stands in the first sentence."""
    where, values = row
    for item in flat(form, row):
        sentence = item.fields["sentence1"]
        try:
            start, end = int(values["start1"]), int(values["end1"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{where}: start1 and end1 must be the places of the word in sentence1") from None
        if not 0 <= start < end <= len(sentence):
            raise DataError(f"{where}: start1 {start} and end1 {end} are no place in sentence1")
        yield replace(item, fields={**item.fields, "word": sentence[start:end]})


def choices_of_copa(form: Form, row: Row) -> Iterator[Item]:
    """A premise and two choices."""
    where, values = row
    for item in flat(form, row):
        if item.fields["question"] not in ("cause", "effect"):
            raise DataError(f"{where}: question is {item.fields['question']!r:.60}; it must be cause or effect")
        yield replace(item, choices=tuple(_text(form, values, (name,), where) for name in form.labels))


def items_of_multirc(form: Form, row: Row) -> Iterator[Item]:
    """One item per answer: of SuperGLUE's nested passages, or of the hub's rows, which have an answer each."""
    where, values = row
    if "passage" not in values:
        for item in flat(form, row):
            index = values.get("idx")
            if not isinstance(index, Mapping):
                index = item.fields
            yield replace(item, group=f"{index.get('paragraph')}\0{index.get('question')}")
        return
    passage = _key(values, "passage", dict, where)
    paragraph = _key(passage, "text", str, where)
    for q, question in enumerate(_objects(passage, "questions", where), 1):
        place = f"{where}, question {q}"
        for a, answer in enumerate(_objects(question, "answers", place), 1):
            at = f"{place}, answer {a}"
            fields = {"paragraph": paragraph, "question": _key(question, "question", str, place)}
            fields["answer"] = _key(answer, "text", str, at)
            yield Item(fields, label_of(form, answer, at), at, group=place)


def items_of_record(form: Form, row: Row) -> Iterator[Item]:
    """One item per query: the entities of the passage are its choices, each form of a name once."""
    where, values = row
    if isinstance(values.get("passage"), str):
        entities, answers = (_texts(values, key, where) for key in ("entities", "answers"))
        yield _cloze(values["passage"], _key(values, "query", str, where), entities, answers, where)
        return
    passage = _key(values, "passage", dict, where)
    text = _key(passage, "text", str, where)
    entities = []
    for span in _objects(passage, "entities", where):
        start, end = _number(span, "start", where), _number(span, "end", where)
        if not start <= end < len(text):
            raise DataError(f"{where}: the entity from {start} to {end} is no place in the passage")
        entities.append(text[start : end + 1])  # the end is the place of the last character
    for q, query in enumerate(_objects(values, "qas", where), 1):
        place = f"{where}, query {q}"
        answers = [_key(x, "text", str, place) for x in _objects(query, "answers", place)]
        yield _cloze(text, _key(query, "query", str, place), entities, answers, place)


def marked_wsc(form: Form, row: Row) -> Iterator[Item]:
    """A wsc row: the pronoun gets stars, as a reader of plain text must see which one is meant."""
    where, values = row
    target = values.get("target")
    spans = target if isinstance(target, Mapping) else values
    text = _text(form, values, ("text",), where)
    noun, pronoun = (_text(form, spans, (name,), where) for name in ("span1_text", "span2_text"))
    words, place = text.split(" "), _number(spans, "span2_index", where)
    end = place + len(pronoun.split(" "))
    found = " ".join(words[place:end])
    if not found.lower().startswith(pronoun.lower().rstrip(".,;:!?")):
        raise DataError(f"{where}: span2_index {place} is not where {pronoun!r:.60} stands in the text")
    marked = " ".join([*words[:place], f"*{found}*", *words[end:]])
    yield Item({"text": marked, "noun": noun, "pronoun": pronoun}, label_of(form, values, where), where)


def label_of(form: Form, values: Mapping[str, Any], where: str) -> str:
    """The label's name; where the labels have none, the number as text."""
    value = _cell(values, form.label, where)
    if form.graded:
        return _score(value, where)
    column = form.label[0]
    text = "" if value is None else str(value).strip()
    if not text:
        raise DataError(f"{where}: {column} is empty; every row needs a label (the official test sets have none)")
    if text.lower() in form.labels:
        return text.lower()
    if text == "-1":
        raise DataError(f"{where}: {column} is -1: this split keeps its labels back; use the validation split")
    if text in map(str, range(len(form.labels))):
        return form.labels[int(text)]
    raise DataError(
        f"{where}: {column} is {text!r:.60}; {form.name} has {', '.join(form.labels)} "
        f"(or 0 to {len(form.labels) - 1} in this order){suggestion(text, form.labels)}"
    )


def _score(value: Any, where: str) -> str:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if score == -1:
        raise DataError(f"{where}: the score is -1: this split keeps its labels back; use the validation split")
    if isinstance(value, bool) or not 0 <= score <= 5:
        raise DataError(f"{where}: the score is {value!r:.60}; it must be a number from 0 to 5")
    return repr(score)


def _cloze(passage: str, query: str, entities: Sequence[str], answers: Sequence[str], where: str) -> Item:
    if "@placeholder" not in query:
        raise DataError(f"{where}: the query has no @placeholder to fill")
    choices = tuple(dict.fromkeys(entities))
    return Item({"passage": passage, "query": query}, answers[0], where, choices=choices, answers=tuple(answers))


def _cell(values: Mapping[str, Any], columns: Sequence[str], where: str) -> Any:
    for column in columns:
        if column in values:
            return values[column]
    wanted = " or ".join(map(repr, columns))
    raise DataError(f"{where}: no column {wanted} (it has {', '.join(map(str, values))}); name it as the task does")


def _text(form: Form, values: Mapping[str, Any], columns: Sequence[str], where: str) -> str:
    value = _cell(values, columns, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {columns[0]} is {value!r:.60}, not a text")
    if not value.strip() and not form.blank:
        raise DataError(f"{where}: {columns[0]} is empty; fill it in or remove the row")
    return value


def _key(values: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = values.get(key)
    if not isinstance(value, kind) or not value:
        names = {str: "a text", list: "a list", dict: "an object"}
        raise DataError(f"{where}: {key!r} must be {names[kind]} that is not empty, is {value!r:.60}")
    return value


def _objects(values: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    found = _key(values, key, list, where)
    if not all(isinstance(x, Mapping) for x in found):
        raise DataError(f"{where}: {key!r} must be a list of objects")
    return found


def _texts(values: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = _key(values, key, list, where)
    if not all(isinstance(x, str) and x for x in found):
        raise DataError(f"{where}: {key!r} must be a list of texts")
    return found


def _number(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: {key!r} must be a number from 0 on, is {value!r:.60}")
    return value
