"""Rows in the form of the GLUE and SuperGLUE tasks: their own files, or any table with columns of the same names.

    cola:CoLA/dev.tsv      NAME:SOURCE, where SOURCE is a file, the folder of the download, or a hub data set
    boolq:BoolQ            its val.jsonl (as a training set its train.jsonl)
    mnli:nyu-mll/glue:mnli

GLUE's own files are tables with tabs and without quoting, CoLA's without a header; SuperGLUE's are JSONL, two of them
nested. Labels are taken as names, as the numbers of the hub's copies, or as true and false, and become names. Sources:
Wang et al. 2018 (1804.07461) and 2019 (1905.00537). Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from upslope.config import suggestion
from upslope.data.glue_rows import Form, Item, choices_of_copa, items_of_multirc, items_of_record, marked_wsc, with_word
from upslope.data.labels import LabelledText
from upslope.data.readers import Row, rows_of, table_rows, text_of
from upslope.errors import ConfigError, DataError

__all__ = ["FORMS", "Form", "Item", "Items", "Split", "form_of", "labelled", "read_items"]

Split = Literal["train", "validation", "test"]
_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.tsv", "train.jsonl"),
    "validation": ("dev{}.tsv", "val.jsonl"),
    "test": ("test{}.tsv", "test.jsonl"),
}


@dataclass(frozen=True, slots=True)
class Items:
    """The items of one source. broken: rows of qqp torn by line breaks in a question, left out as GLUE's loaders do."""

    form: Form
    items: list[Item]
    broken: list[str] = field(default_factory=list)


def form_of(spec: str) -> tuple[Form, str] | None:
    """The form and the source of NAME:SOURCE; None where the text does not begin with the name of a task."""
    name, colon, source = spec.partition(":")
    form = FORMS.get(name)
    if form is None or not colon:
        return None
    if not source:
        raise ConfigError(f"{spec}: name the file, folder or hub data set behind the colon, as in {name}:dev.tsv")
    return form, source


def read_items(spec: str, *, split: Split = "validation") -> Items:
    """The items of NAME:SOURCE. `split` says which file of a folder, or which part of a hub data set, is meant.

    DataError names file, row, column and remedy: no such file, a column that is not there, an empty text, a label
    that the task does not have or that is kept back (-1), a row of another width, no rows. ConfigError: no such task.
    """
    found = form_of(spec)
    if found is None:
        name = spec.partition(":")[0]
        hint = suggestion(name, FORMS)
        raise ConfigError(f"{spec}: no GLUE or SuperGLUE task {name!r}{hint} (there are {', '.join(FORMS)})")
    form, source = found
    broken: list[str] = []
    items = [item for row in _rows(form, source, split, broken) for item in form.items(form, row)]
    if not items:
        raise DataError(f"{source}: holds no rows")
    return Items(form, items, broken)


def labelled(items: Items) -> list[LabelledText]:
    """What an encoder reads: one text or a pair, and the label. ConfigError for copa and record."""
    form = items.form
    if not form.text:
        raise ConfigError(f"{form.name}: a label per text cannot choose among texts; measure a causal model on it")
    made = []
    for item in items.items:
        texts = [text.format(**item.fields) for text in form.text]
        made.append(LabelledText(texts[0], item.label, texts[1] if len(texts) > 1 else None, item.where))
    return made


def _rows(form: Form, source: str, split: Split, broken: list[str]) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        names = [name.format(form.part) for name in _FILES[split]]
        path = next((path / name for name in names if (path / name).is_file()), path)
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        yield from _folder_rows(form, path, split)
    elif name.endswith(".tsv"):
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        yield from _tsv_rows(form, path, split, broken)
    elif path.is_file() or name.endswith((".jsonl", ".json", ".csv", ".parquet")):
        yield from rows_of(path)
    else:
        yield from rows_of(source, split=_part(form, split))


def _part(form: Form, split: Split) -> str:
    """The split's name in a hub data set."""
    return split if split == "train" else split + form.part


def _folder_rows(form: Form, folder: Path, split: Split) -> Iterator[Row]:
    """Rows of a folder laid out as a hub data set is."""
    files = " or ".join(name.format(form.part) for name in _FILES[split])
    why = f"{folder}: has no {files}, and as a data set"
    yield from table_rows(str(folder), "", _part(form, split), str(folder), why)


def _tsv_rows(form: Form, path: Path, split: Split, broken: list[str]) -> Iterator[Row]:
    """Cells between tabs, taken as they stand: a quote is a character like any other."""
    lines = [line.rstrip("\r") for line in text_of(path).split("\n")]
    first = lines[0].split("\t")
    bare = bool(form.header) and split != "test" and first != list(form.header)
    header = list(form.header) if bare else first
    for number, line in enumerate(lines[not bare :], 2 - bare):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) == len(header):
            yield f"{path}:{number}", dict(zip(header, cells, strict=True))
        elif form.name == "qqp":
            broken.append(f"{path}:{number}")
        else:
            raise DataError(
                f"{path}:{number}: {len(cells)} cells between tabs where there should be {len(header)} "
                f"({', '.join(header)}); is it {form.name}'s own file?"
            )


_TRUTH = ("false", "true")
_NLI = {"premise": ("sentence1", "premise"), "hypothesis": ("sentence2", "hypothesis")}
_NLI_TEXT = ("{premise}", "{hypothesis}")
_MNLI = Form(_NLI, ("gold_label", "label"), ("entailment", "neutral", "contradiction"), _NLI_TEXT)
_SENTENCE = {"sentence": ("sentence",)}
_SENTENCES = {"sentence1": ("sentence1",), "sentence2": ("sentence2",)}
_SENTENCES_TEXT = ("{sentence1}", "{sentence2}")

_TABLE: dict[str, Form] = {
    "cola": Form(
        _SENTENCE,
        ("label",),
        ("unacceptable", "acceptable"),
        ("{sentence}",),
        header=("source", "label", "notes", "sentence"),
    ),
    "sst2": Form(_SENTENCE, ("label",), ("negative", "positive"), ("{sentence}",)),
    "mrpc": Form(
        {"sentence1": ("#1 String", "sentence1"), "sentence2": ("#2 String", "sentence2")},
        ("Quality", "label"),
        ("not_equivalent", "equivalent"),
        _SENTENCES_TEXT,
    ),
    "qqp": Form(
        {"question1": ("question1",), "question2": ("question2",)},
        ("is_duplicate", "label"),
        ("not_duplicate", "duplicate"),
        ("{question1}", "{question2}"),
        blank=True,  # its own rows 105,780 and 201,841 have no second question
    ),
    "stsb": Form(_SENTENCES, ("score", "label"), (), _SENTENCES_TEXT),
    "mnli": replace(_MNLI, part="_matched"),
    "mnli_mismatched": replace(_MNLI, part="_mismatched"),
    "qnli": Form(
        {"question": ("question",), "sentence": ("sentence",)},
        ("label",),
        ("entailment", "not_entailment"),
        ("{question}", "{sentence}"),
    ),
    "rte": Form(_NLI, ("label",), ("entailment", "not_entailment"), _NLI_TEXT),
    "wnli": Form(_NLI, ("label",), ("not_entailment", "entailment"), _NLI_TEXT),
    "boolq": Form(
        {"passage": ("passage",), "question": ("question",)}, ("label", "answer"), _TRUTH, ("{passage}", "{question}")
    ),
    "cb": Form(_NLI, ("label",), ("entailment", "contradiction", "neutral"), _NLI_TEXT),
    "copa": Form(
        {"premise": ("premise",), "question": ("question",)}, ("label",), ("choice1", "choice2"), items=choices_of_copa
    ),
    "multirc": Form(
        {"paragraph": ("paragraph",), "question": ("question",), "answer": ("answer",)},
        ("label",),
        _TRUTH,
        ("{paragraph}", "{question} {answer}"),
        items=items_of_multirc,
    ),
    "record": Form({}, (), (), items=items_of_record),
    "wic": Form(_SENTENCES, ("label",), _TRUTH, ("{word}: {sentence1}", "{sentence2}"), items=with_word),
    "wsc": Form({}, ("label",), _TRUTH, ("{text}", "{noun}"), items=marked_wsc),
}
FORMS: dict[str, Form] = {name: replace(form, name=name) for name, form in _TABLE.items()}
"""The tasks by name."""
