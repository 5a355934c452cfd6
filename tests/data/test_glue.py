"""GLUE and SuperGLUE files: every layout and its quirks, hub copies, tables of one's own, and rubbish."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.data.glue import FORMS, form_of, label_of, labelled, read_items
from upslope.errors import ConfigError, DataError, UpslopeError


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def lines(path: Path, *rows: Mapping[str, Any]) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_cola_has_no_header_and_four_columns(tmp_path: Path) -> None:
    path = written(tmp_path / "dev.tsv", 'gj04\t1\t\tThe sailors rode the breeze.\nbc01\t0\t*\t"Mary" wonders.\n')
    found = read_items(f"cola:{path}")
    assert [(x.label, x.fields["sentence"]) for x in found.items] == [
        ("acceptable", "The sailors rode the breeze."),
        ("unacceptable", '"Mary" wonders.'),
    ]
    assert [x.where for x in found.items] == [f"{path}:1", f"{path}:2"]
    with_header = written(tmp_path / "own.tsv", "source\tlabel\tnotes\tsentence\na\t1\t\tText\n")
    assert [x.where for x in read_items(f"cola:{with_header}").items] == [f"{with_header}:2"]


TABLES = {
    "sst2": ("sentence\tlabel\nhide new secretions \t0\n", {"sentence": "hide new secretions "}, "negative"),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "foo .\t"Foo" , he said .\n',
        {"sentence1": 'He said "foo .', "sentence2": '"Foo" , he said .'},
        "equivalent",
    ),
    "qqp": (
        'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy "?\tHow?\t0\n',
        {"question1": 'Why "?', "question2": "How?"},
        "not_duplicate",
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\tnone\tnone\tA man.\tA woman.\t3.800\n",
        {"sentence1": "A man.", "sentence2": "A woman."},
        "3.8",
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tp\th\tneutral\tcontradiction\n",
        {"premise": "p", "hypothesis": "h"},
        "contradiction",
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n",
        {"question": "q", "sentence": "s"},
        "not_entailment",
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\tp\th\tentailment\n",
        {"premise": "p", "hypothesis": "h"},
        "entailment",
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tp\th\t0\n", {"premise": "p", "hypothesis": "h"}, "not_entailment"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_glue_take_quotes_as_they_stand(name: str, tmp_path: Path) -> None:
    text, fields, label = TABLES[name]
    for ending in ("\n", "\r\n"):
        path = tmp_path / "x.tsv"
        path.write_bytes(text.replace("\n", ending).encode())
        (item,) = read_items(f"{name}:{path}").items
        assert (dict(item.fields), item.label, item.where) == (fields, label, f"{path}:2")
    packed = tmp_path / "x.tsv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_items(f"{name}:{packed}").items[0].label == label


ROWS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "boolq": (
        {"question": "is it", "passage": "P", "idx": 0, "label": True},
        {"passage": "P", "question": "is it"},
        "true",
    ),
    "cb": ({"premise": "p", "hypothesis": "h", "label": "neutral"}, {"premise": "p", "hypothesis": "h"}, "neutral"),
    "rte": (
        {"premise": "p", "hypothesis": "h", "label": "not_entailment"},
        {"premise": "p", "hypothesis": "h"},
        "not_entailment",
    ),
    "copa": (
        {"premise": "p.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
        {"premise": "p.", "question": "cause"},
        "choice2",
    ),
    "wic": (
        {
            "word": "place",
            "sentence1": "All the places.",
            "sentence2": "Put it.",
            "label": False,
            "start1": 8,
            "end1": 14,
        },
        {"sentence1": "All the places.", "sentence2": "Put it.", "word": "places"},
        "false",
    ),
    "wsc": (
        {
            "text": "Mark told Pete many lies about himself, which he believed.",
            "target": {"span1_text": "Pete", "span2_text": "himself", "span1_index": 2, "span2_index": 6},
            "label": False,
        },
        {
            "text": "Mark told Pete many lies about *himself,* which he believed.",
            "noun": "Pete",
            "pronoun": "himself",
        },
        "false",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_flat_rows_of_superglue(name: str, tmp_path: Path) -> None:
    row, fields, label = ROWS[name]
    (item,) = read_items(f"{name}:{lines(tmp_path / 'val.jsonl', row)}").items
    assert (dict(item.fields), item.label) == (fields, label)


def test_multirc_nested_and_flat_give_the_same_items(tmp_path: Path) -> None:
    answers = [{"text": "a1", "idx": 0, "label": 0}, {"text": "a2", "idx": 1, "label": 1}]
    more = [{"text": "b1", "idx": 2, "label": 1}]
    questions = [{"question": "q1", "answers": answers}, {"question": "q2", "answers": more}]
    nested = lines(tmp_path / "n.jsonl", {"idx": 0, "passage": {"text": "T", "questions": questions}})
    flat = [
        {"paragraph": "T", "question": q["question"], "answer": a["text"], "label": a["label"]}
        for q in questions
        for a in q["answers"]  # type: ignore[index, union-attr]
    ]
    numbered = [{**row, "idx": {"paragraph": 0, "question": "q1 q2".index(row["question"])}} for row in flat]
    first = read_items(f"multirc:{nested}").items
    for rows in (flat, numbered):
        second = read_items(f"multirc:{lines(tmp_path / 'f.jsonl', *rows)}").items
        assert [(dict(x.fields), x.label) for x in second] == [(dict(x.fields), x.label) for x in first]
        assert [x.group == second[0].group for x in second] == [True, True, False]
    assert [x.label for x in first] == ["false", "true", "true"]
    assert [x.group == first[0].group for x in first] == [True, True, False]
    assert first[2].where == f"{nested}:1, question 2, answer 1"
    row = labelled(read_items(f"multirc:{nested}"))[0]
    assert (row.text, row.pair, row.label) == ("T", "q1 a1", "false")


def test_record_nested_and_flat_give_the_same_items(tmp_path: Path) -> None:
    text = "Anna met Bob.\n@highlight\nBob left Anna"
    spans = [{"start": 0, "end": 3}, {"start": 9, "end": 11}, {"start": 25, "end": 27}]
    qas = [{"query": "@placeholder left", "answers": [{"start": 9, "end": 11, "text": "Bob"}]}]
    nested = lines(tmp_path / "n.jsonl", {"passage": {"text": text, "entities": spans}, "qas": qas})
    flat = lines(
        tmp_path / "f.jsonl",
        {"passage": text, "query": "@placeholder left", "entities": ["Anna", "Bob"], "answers": ["Bob"]},
    )
    for path in (nested, flat):
        (item,) = read_items(f"record:{path}").items
        assert (item.choices, item.answers) == (("Anna", "Bob"), ("Bob",))
        assert item.fields["query"] == "@placeholder left"
    with pytest.raises(ConfigError, match="record: a label per text cannot choose among texts"):
        labelled(read_items(f"record:{nested}"))


def test_a_folder_of_the_download_gives_each_split_its_file(tmp_path: Path) -> None:
    for name, label in (("train", 0), ("dev_matched", 1), ("dev_mismatched", 2)):
        written(tmp_path / "MNLI" / f"{name}.tsv", f"sentence1\tsentence2\tgold_label\np\th\t{label}\n")
    assert read_items(f"mnli:{tmp_path / 'MNLI'}").items[0].label == "neutral"
    assert read_items(f"mnli:{tmp_path / 'MNLI'}", split="train").items[0].label == "entailment"
    assert read_items(f"mnli_mismatched:{tmp_path / 'MNLI'}").items[0].label == "contradiction"
    lines(tmp_path / "BoolQ" / "val.jsonl", ROWS["boolq"][0])
    assert len(read_items(f"boolq:{tmp_path / 'BoolQ'}").items) == 1


def test_a_folder_in_the_hubs_layout_and_numbers_for_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "cola"
    lines(folder / "train.jsonl.unused")
    rows = [{"sentence": "one", "label": 1, "idx": 0}, {"sentence": "two", "label": 0, "idx": 1}]
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "validation-00000-of-00001.parquet")
    (folder / "train.jsonl.unused").unlink()
    found = read_items(f"cola:{folder}")
    assert [(x.fields["sentence"], x.label) for x in found.items] == [("one", "acceptable"), ("two", "unacceptable")]
    assert found.items[1].where == f"{folder}[validation] row 2"
    with pytest.raises(DataError, match=r"cola: has no train.tsv or train.jsonl, and as a data set .split 'train'.*"):
        read_items(f"cola:{folder}", split="train")


def test_a_hub_data_set_is_asked_for_its_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return [{"premise": "p", "hypothesis": "h", "label": 2, "idx": 0}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (item,) = read_items("mnli_mismatched:nyu-mll/glue:mnli").items
    assert (item.label, item.where) == ("contradiction", "nyu-mll/glue:mnli[validation_mismatched] row 1")
    read_items("mnli:nyu-mll/glue:mnli", split="train")
    assert asked == [("nyu-mll/glue", "mnli", "validation_mismatched"), ("nyu-mll/glue", "mnli", "train")]


def test_tables_with_columns_of_the_same_names(tmp_path: Path) -> None:
    path = written(tmp_path / "own.csv", 'label,sentence2,sentence1\nequivalent,"b, c",a\n0,d,e\n')
    assert [(r.text, r.pair, r.label) for r in labelled(read_items(f"mrpc:{path}"))] == [
        ("a", "b, c", "equivalent"),
        ("e", "d", "not_equivalent"),
    ]
    words = lines(tmp_path / "wic.jsonl", ROWS["wic"][0])
    (row,) = labelled(read_items(f"wic:{words}"))
    assert (row.text, row.pair) == ("places: All the places.", "Put it.")


def test_torn_rows_of_qqp_are_counted_and_other_tables_refused(tmp_path: Path) -> None:
    text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ttorn\nhalf?\tb\t0\n2\t3\t4\ta\t\t1\n"
    path = written(tmp_path / "train.tsv", text)
    found = read_items(f"qqp:{path}")
    assert [x.label for x in found.items] == ["duplicate"]
    assert found.broken == [f"{path}:2", f"{path}:3"]
    torn = written(tmp_path / "x.tsv", "sentence\tlabel\na\t1\nb")
    with pytest.raises(DataError, match=r"x.tsv:3: 1 cells between tabs where there should be 2 .sentence, label."):
        read_items(f"sst2:{torn}")
    narrow = written(tmp_path / "y.tsv", "a\tb\n")
    with pytest.raises(DataError, match=r"y.tsv:1: 2 cells .* be 4 .source, label, notes, sentence.; is it cola's own"):
        read_items(f"cola:{narrow}")


def without(name: str, *keys: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**ROWS[name][0], **changes}.items() if k not in keys}


HEADER = "sentence\tlabel\n"


def scored(score: Any) -> dict[str, Any]:
    return {"sentence1": "a", "sentence2": "b", "score": score}


TARGET = ROWS["wsc"][0]["target"]
UNLABELLED = {"passage": {"text": "t", "questions": [{"question": "q", "answers": [{"text": "a"}]}]}}
BAD: list[tuple[str, Any, str]] = [
    ("boolq", without("boolq", "label"), r"no column 'label' or 'answer' .it has question, passage, idx.; name it"),
    ("boolq", without("boolq", label=None), "label is empty; every row needs a label"),
    ("boolq", without("boolq", label=-1), "label is -1: this split keeps its labels back; use the validation split"),
    ("boolq", without("boolq", label=2), r"label is '2'; boolq has false, true .or 0 to 1"),
    ("boolq", without("boolq", label="ture"), "did you mean 'true'"),
    ("boolq", without("boolq", label=[1]), r"label is '\[1\]'"),
    ("boolq", without("boolq", passage=" "), "passage is empty"),
    ("boolq", without("boolq", passage=3), "passage is 3, not a text"),
    ("stsb", scored("six"), "the score is 'six'; it must be a number from 0 to 5"),
    ("stsb", scored(float("nan")), "the score is nan"),
    ("stsb", scored(5.1), "the score is 5.1"),
    ("stsb", scored(True), "the score is True"),
    ("stsb", scored(-1.0), "keeps its labels back"),
    ("copa", without("copa", question="why"), "question is 'why'; it must be cause or effect"),
    ("copa", without("copa", "choice2"), "no column 'choice2'"),
    ("wic", without("wic", "start1"), "start1 and end1 must be the places of the word"),
    ("wic", without("wic", end1=99), "start1 8 and end1 99 are no place in sentence1"),
    ("wsc", without("wsc", target={**TARGET, "span2_index": 1}), "span2_index 1 is not where 'himself'"),
    ("wsc", without("wsc", target={**TARGET, "span2_index": -1}), "'span2_index' must be a number"),
    ("wsc", without("wsc", "target"), "no column 'span1_text'"),
    ("multirc", {"passage": "text"}, "'passage' must be an object"),
    ("multirc", {"passage": {"text": "t"}}, "'questions' must be a list that is not empty, is None"),
    ("multirc", {"passage": {"text": "t", "questions": ["q"]}}, "'questions' must be a list of objects"),
    ("multirc", UNLABELLED, "question 1, answer 1: no column 'label'"),
    ("record", {"passage": {"text": "ab", "entities": [{"start": 0, "end": 2}]}}, "the entity from 0 to 2 is no place"),
    ("record", {"passage": {"text": "ab", "entities": [{"start": 0, "end": 1}]}}, "'qas' must be a list that is not"),
    ("record", {"passage": "a", "query": "q", "entities": ["x"], "answers": ["x"]}, "the query has no @placeholder"),
    ("record", {"passage": "a", "query": "q", "entities": [1], "answers": ["x"]}, "'entities' must be a list of texts"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "says"), BAD)
def test_bad_rows_are_named_in_one_line(name: str, row: Any, says: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", row)
    with pytest.raises(DataError, match=rf"a.jsonl:1(:|,) ?.*{says}") as caught:
        read_items(f"{name}:{path}")
    assert "\n" not in str(caught.value)


def test_specs_that_name_no_task_or_no_source(tmp_path: Path) -> None:
    assert form_of("plain.csv") is None
    assert form_of("own/cola:configuration") is None
    with pytest.raises(
        ConfigError, match=r"no GLUE or SuperGLUE task 'coala'; did you mean 'cola'\? .there are cola, sst2"
    ):
        read_items("coala:dev.tsv")
    with pytest.raises(ConfigError, match="name the file, folder or hub data set behind the colon"):
        read_items("cola:")
    with pytest.raises(DataError, match=r"none.tsv: no such file"):
        read_items(f"cola:{tmp_path / 'none.tsv'}")
    with pytest.raises(DataError, match=r"none.jsonl: no such file"):
        read_items(f"boolq:{tmp_path / 'none.jsonl'}")
    with pytest.raises(DataError, match=r"e.tsv: holds no rows"):
        read_items(f"sst2:{written(tmp_path / 'e.tsv', HEADER)}")


def whole_or_one_line(spec: str) -> bool:
    try:
        return bool(read_items(spec).items)
    except UpslopeError as error:
        return "\n" not in str(error)


@given(st.sampled_from(sorted(FORMS)), st.sampled_from(["tsv", "jsonl", "csv"]), st.binary(max_size=80))
def test_any_bytes_are_rows_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, kind: str, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"x.{kind}"
    path.write_bytes(data)
    assert whole_or_one_line(f"{name}:{path}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "questions", "answers", "start", "end", "label", "question"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
KEYS = ["passage", "qas", "query", "entities", "answers", "paragraph", "question", "answer", "label", "text", "target"]


@given(
    st.sampled_from(["multirc", "record", "wsc", "wic", "copa", "stsb"]), st.dictionaries(st.sampled_from(KEYS), JSON)
)
def test_any_object_is_items_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, row: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.jsonl"
    path.write_text(json.dumps(row))
    assert whole_or_one_line(f"{name}:{path}")


NUMBERED = {
    "cola": "unacceptable acceptable",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "qqp": "not_duplicate duplicate",
    "mnli": "entailment neutral contradiction",
    "mnli_mismatched": "entailment neutral contradiction",
    "qnli": "entailment not_entailment",
    "rte": "entailment not_entailment",
    "wnli": "not_entailment entailment",
    "boolq": "false true",
    "cb": "entailment contradiction neutral",
    "copa": "choice1 choice2",
    "multirc": "false true",
    "wic": "false true",
    "wsc": "false true",
}
"""What the numbers mean in the hub's copies of GLUE and SuperGLUE."""


def test_numbers_are_the_labels_that_the_hub_counts() -> None:
    graded = {name for name, form in FORMS.items() if not form.labels}
    assert set(NUMBERED) | graded == set(FORMS)
    for name, names in NUMBERED.items():
        form = FORMS[name]
        said = [label_of(form, {form.label[-1]: number}) for number in range(len(names.split()))]
        assert said == names.split(), name
