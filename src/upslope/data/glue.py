"""Rows in the form of the GLUE and SuperGLUE tasks: their own files, or any table with columns of the same names.

    cola:CoLA/dev.tsv      NAME:SOURCE, where SOURCE is a file, the folder of the download, or a hub data set
    boolq:BoolQ            its val.jsonl (as a training set its train.jsonl)
    mnli:nyu-mll/glue:mnli

GLUE's own files are tables with tabs and without quoting, CoLA's without a header; SuperGLUE's are JSONL, two of them
nested. Labels are taken as names, as the numbers of the hub's copies, or as true and false, and become names. Sources:
Wang et al. 2018 (1804.07461) and 2019 (1905.00537). Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from upslope.config import suggestion
from upslope.data.labels import LabelledText, filled_text
from upslope.data.messages import at, finite
from upslope.data.readers import Row, rows_of, table_rows, text_of
from upslope.errors import ConfigError, DataError

Split = Literal["train", "validation", "test"]
_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.tsv", "train.jsonl"),
    "validation": ("dev{}.tsv", "val.jsonl"),
    "test": ("test{}.tsv", "test.jsonl"),
}


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

    fields: each text and the columns it may stand in; labels: their names in the order of the hub's numbers (none: the
    label is a number from 0 to 5); label: the columns of the label; text: what an encoder reads, one text or two, made
    of the fields (none for a task that only likelihoods can answer); header: of a file that has none; part: what the
    names of its validation and test splits end with; blank: texts may be empty; items: what makes items of a row.
    """

    fields: Mapping[str, tuple[str, ...]]
    labels: tuple[str, ...]
    label: tuple[str, ...] = ("label",)
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


@dataclass(frozen=True, slots=True)
class Items:
    """The items of one source. broken: rows of qqp torn by line breaks in a question, left out as GLUE's loaders do."""

    form: Form
    items: list[Item]
    broken: list[str] = field(default_factory=list)


def form_of(spec: str) -> tuple[Form, str] | None:
    """The form and the source of NAME:SOURCE; None where the text does not begin with the name of a task."""
    name, colon, source = spec.partition(":")
    if (form := FORMS.get(name)) is None or not colon:
        return None
    if not source:
        raise ConfigError(f"{spec}: name the file, folder or hub data set behind the colon, as in {name}:dev.tsv")
    return form, source


def read_items(spec: str, *, split: Split = "validation") -> Items:
    """The items of NAME:SOURCE. `split` says which file of a folder, or which part of a hub data set, is meant.

    DataError names file, row, column and remedy: no such file, a column that is not there, an empty text, a label
    that the task does not have or that is kept back (-1), a row of another width, no rows. ConfigError: no such task.
    """
    if (found := form_of(spec)) is None:
        name = spec.partition(":")[0]
        hint = suggestion(name, FORMS)
        raise ConfigError(f"{spec}: no GLUE or SuperGLUE task {name!r}{hint} (there are {', '.join(FORMS)})")
    form, source = found
    broken: list[str] = []
    items: list[Item] = []
    for row in _rows(form, source, split, broken):
        with at(row[0]):
            items += form.items(form, row)
    if not items:
        raise DataError(f"{source}: holds no rows")
    return Items(form, items, broken)


def labelled(items: Items) -> list[LabelledText]:
    """What an encoder reads: one text or a pair, and the label. ConfigError for copa and record."""
    if not (form := items.form).text:
        raise ConfigError(f"{form.name}: a label per text cannot choose among texts; measure a causal model on it")
    first, second = (*form.text, None)[:2]
    return [
        LabelledText(first.format(**item.fields), item.label, second and second.format(**item.fields), item.where)
        for item in items.items
    ]


def _rows(form: Form, source: str, split: Split, broken: list[str]) -> Iterator[Row]:
    path = Path(source).expanduser()
    files = [name.format(form.part) for name in _FILES[split]]
    path = next((path / name for name in files if (path / name).is_file()), path)
    name = path.name.lower().removesuffix(".gz")
    part = split if split == "train" else split + form.part  # the split's name in a hub data set
    if path.is_dir():  # laid out as a hub data set is
        yield from table_rows(str(path), "", part, str(path), f"{path}: has no {' or '.join(files)}, and as a data set")
    elif name.endswith(".tsv"):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        yield from _tsv_rows(form, path, split, broken)
    elif path.is_file() or name.endswith((".jsonl", ".json", ".csv", ".parquet")):
        yield from rows_of(path)
    else:
        yield from rows_of(source, split=part)


def _tsv_rows(form: Form, path: Path, split: Split, broken: list[str]) -> Iterator[Row]:
    """Cells between tabs, taken as they stand: a quote is a character like any other."""
    lines = [line.rstrip("\r") for line in text_of(path).split("\n")]
    first = lines[0].split("\t")
    bare = bool(form.header) and split != "test" and first != list(form.header)
    header = list(form.header) if bare else first
    for number, line in enumerate(lines[not bare :], 2 - bare):
        if not line.strip():
            continue
        if len(cells := line.split("\t")) == len(header):
            yield f"{path}:{number}", dict(zip(header, cells, strict=True))
        elif form.name == "qqp":
            broken.append(f"{path}:{number}")
        else:
            raise DataError(
                f"{path}:{number}: {len(cells)} cells between tabs where there should be {len(header)} "
                f"({', '.join(header)}); is it {form.name}'s own file?"
            )


def flat(form: Form, row: Row) -> Iterator[Item]:
    """The one item of a row with a column per text."""
    where, values = row
    fields = {name: _text(form, values, columns) for name, columns in form.fields.items()}
    yield Item(fields, label_of(form, values), where)


def with_word(form: Form, row: Row) -> Iterator[Item]:
    """A wic row: start1 and end1 say where its word stands in the first sentence."""
    for item in flat(form, row):
        sentence = item.fields["sentence1"]
        try:
            start, end = int(row[1]["start1"]), int(row[1]["end1"])
        except (KeyError, TypeError, ValueError):
            raise DataError("start1 and end1 must be the places of the word in sentence1") from None
        if not 0 <= start < end <= len(sentence):
            raise DataError(f"start1 {start} and end1 {end} are no place in sentence1")
        yield replace(item, fields={**item.fields, "word": sentence[start:end]})


def choices_of_copa(form: Form, row: Row) -> Iterator[Item]:
    """A premise and two choices."""
    for item in flat(form, row):
        if item.fields["question"] not in ("cause", "effect"):
            raise DataError(f"question is {item.fields['question']!r:.60}; it must be cause or effect")
        yield replace(item, choices=tuple(_text(form, row[1], (name,)) for name in form.labels))


def items_of_multirc(form: Form, row: Row) -> Iterator[Item]:
    """One item per answer: of SuperGLUE's nested passages, or of the hub's rows, which have an answer each."""
    where, values = row
    if "passage" not in values:
        for item in flat(form, row):
            index = values["idx"] if isinstance(values.get("idx"), Mapping) else item.fields
            yield replace(item, group=f"{index.get('paragraph')}\0{index.get('question')}")
        return
    passage = _key(values, "passage", dict)
    paragraph = _key(passage, "text", str)
    for q, question in enumerate(_each(passage, "questions", Mapping), 1):
        with at(place := f"{where}, question {q}"):
            asked = _key(question, "question", str)
            for a, answer in enumerate(_each(question, "answers", Mapping), 1):
                with at(there := f"{place}, answer {a}"):
                    fields = {"paragraph": paragraph, "question": asked, "answer": _key(answer, "text", str)}
                    yield Item(fields, label_of(form, answer), there, group=place)


def items_of_record(form: Form, row: Row) -> Iterator[Item]:
    """One item per query: the entities of the passage are its choices, each form of a name once."""
    where, values = row
    if isinstance(values.get("passage"), str):
        entities, answers = (_each(values, key, str) for key in ("entities", "answers"))
        yield _cloze(values["passage"], _key(values, "query", str), entities, answers, where)
        return
    passage = _key(values, "passage", dict)
    text = _key(passage, "text", str)
    entities = []
    for span in _each(passage, "entities", Mapping):
        start, end = _number(span, "start"), _number(span, "end")
        if not start <= end < len(text):
            raise DataError(f"the entity from {start} to {end} is no place in the passage")
        entities.append(text[start : end + 1])  # the end is the place of the last character
    for q, query in enumerate(_each(values, "qas", Mapping), 1):
        with at(place := f"{where}, query {q}"):
            answers = [_key(x, "text", str) for x in _each(query, "answers", Mapping)]
            yield _cloze(text, _key(query, "query", str), entities, answers, place)


def marked_wsc(form: Form, row: Row) -> Iterator[Item]:
    """A wsc row: the pronoun gets stars, as a reader of plain text must see which one is meant."""
    where, values = row
    target = values.get("target")
    spans = target if isinstance(target, Mapping) else values
    text = _text(form, values, ("text",))
    noun, pronoun = (_text(form, spans, (name,)) for name in ("span1_text", "span2_text"))
    words, place = text.split(" "), _number(spans, "span2_index")
    end = place + len(pronoun.split(" "))
    if not (found := " ".join(words[place:end])).lower().startswith(pronoun.lower().rstrip(".,;:!?")):
        raise DataError(f"span2_index {place} is not where {pronoun!r:.60} stands in the text")
    marked = " ".join([*words[:place], f"*{found}*", *words[end:]])
    yield Item({"text": marked, "noun": noun, "pronoun": pronoun}, label_of(form, values), where)


def label_of(form: Form, values: Mapping[str, Any]) -> str:
    """The label's name; where the labels have none, the number as text."""
    value = _cell(values, form.label)
    if form.graded:
        if (score := finite(value)) == -1:
            raise DataError("the score is -1: this split keeps its labels back; use the validation split")
        if isinstance(value, bool) or score is None or not 0 <= score <= 5:
            raise DataError(f"the score is {value!r:.60}; it must be a number from 0 to 5")
        return repr(score)
    column = form.label[0]
    if not (text := "" if value is None else str(value).strip()):
        raise DataError(f"{column} is empty; every row needs a label (the official test sets have none)")
    if text.lower() in form.labels:
        return text.lower()
    if text == "-1":
        raise DataError(f"{column} is -1: this split keeps its labels back; use the validation split")
    if text in map(str, range(len(form.labels))):
        return form.labels[int(text)]
    raise DataError(
        f"{column} is {text!r:.60}; {form.name} has {', '.join(form.labels)} "
        f"(or 0 to {len(form.labels) - 1} in this order){suggestion(text, form.labels)}"
    )


def _cloze(passage: str, query: str, entities: Sequence[str], answers: Sequence[str], where: str) -> Item:
    if "@placeholder" not in query:
        raise DataError("the query has no @placeholder to fill")
    choices = tuple(dict.fromkeys(entities))
    return Item({"passage": passage, "query": query}, answers[0], where, choices=choices, answers=tuple(answers))


def _cell(values: Mapping[str, Any], columns: Sequence[str]) -> Any:
    for column in columns:
        if column in values:
            return values[column]
    wanted = " or ".join(map(repr, columns))
    raise DataError(f"no column {wanted} (it has {', '.join(map(str, values))}); name it as the task does")


def _text(form: Form, values: Mapping[str, Any], columns: Sequence[str]) -> str:
    return filled_text(_cell(values, columns), columns[0], blank=form.blank)


def _key(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance((value := values.get(key)), kind) or not value:
        names = {str: "a text", list: "a list", dict: "an object"}
        raise DataError(f"{key!r} must be {names[kind]} that is not empty, is {value!r:.60}")
    return value


def _each(values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A list of texts that are not empty, or of objects."""
    found = _key(values, key, list)
    if not all(isinstance(x, kind) and (x or kind is not str) for x in found):
        raise DataError(f"{key!r} must be a list of {'texts' if kind is str else 'objects'}")
    return found


def _number(values: Mapping[str, Any], key: str) -> int:
    if isinstance((value := values.get(key)), bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{key!r} must be a number from 0 on, is {value!r:.60}")
    return value


def _forms(**columns: tuple[str, ...]) -> partial[Form]:
    """Forms of tasks with these texts, which an encoder reads one by one."""
    return partial(Form, columns, text=tuple(f"{{{name}}}" for name in columns))


_TRUTH, _ENTAILS = ("false", "true"), ("entailment", "not_entailment")
_SENTENCE, _SENTENCES = _forms(sentence=("sentence",)), _forms(sentence1=("sentence1",), sentence2=("sentence2",))
_NLI = _forms(premise=("sentence1", "premise"), hypothesis=("sentence2", "hypothesis"))
_MRPC = _forms(sentence1=("#1 String", "sentence1"), sentence2=("#2 String", "sentence2"))
_QQP = _forms(question1=("question1",), question2=("question2",))
_QNLI = _forms(question=("question",), sentence=("sentence",))
_BOOLQ = _forms(passage=("passage",), question=("question",))
_COPA = _forms(premise=("premise",), question=("question",))
_MULTIRC = _forms(paragraph=("paragraph",), question=("question",), answer=("answer",))
_MNLI = _NLI(("entailment", "neutral", "contradiction"), ("gold_label", "label"))

_TABLE: dict[str, Form] = {
    "cola": _SENTENCE(("unacceptable", "acceptable"), header=("source", "label", "notes", "sentence")),
    "sst2": _SENTENCE(("negative", "positive")),
    "mrpc": _MRPC(("not_equivalent", "equivalent"), ("Quality", "label")),
    # its own rows 105,780 and 201,841 have no second question
    "qqp": _QQP(("not_duplicate", "duplicate"), ("is_duplicate", "label"), blank=True),
    "stsb": _SENTENCES((), ("score", "label")),
    "mnli": replace(_MNLI, part="_matched"),
    "mnli_mismatched": replace(_MNLI, part="_mismatched"),
    "qnli": _QNLI(_ENTAILS),
    "rte": _NLI(_ENTAILS),
    "wnli": _NLI(("not_entailment", "entailment")),
    "boolq": _BOOLQ(_TRUTH, ("label", "answer")),
    "cb": _NLI(("entailment", "contradiction", "neutral")),
    "copa": _COPA(("choice1", "choice2"), text=(), items=choices_of_copa),
    "multirc": _MULTIRC(_TRUTH, text=("{paragraph}", "{question} {answer}"), items=items_of_multirc),
    "record": Form({}, (), (), items=items_of_record),
    "wic": _SENTENCES(_TRUTH, text=("{word}: {sentence1}", "{sentence2}"), items=with_word),
    "wsc": Form({}, _TRUTH, text=("{text}", "{noun}"), items=marked_wsc),
}
FORMS: dict[str, Form] = {name: replace(form, name=name) for name, form in _TABLE.items()}
"""The tasks by name."""
