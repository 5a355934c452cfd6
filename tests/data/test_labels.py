"""Labelled rows and tagged sentences: what is read, what is refused with file and line, how data is held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.data.labels import (
    LabelledText,
    Scheme,
    TaggedSentence,
    check_known,
    count_copies,
    labels_of,
    read_conll,
    read_labelled,
    read_rewards,
    shuffled_by_content,
    split_by_content,
    split_sentences,
    stratified_choice,
)
from upslope.data.records import read_records
from upslope.errors import DataError


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    table = written(tmp_path / "a.csv", 'label,text\nyes,"one, two"\nno,three\n')
    lines = written(
        tmp_path / "a.jsonl",
        '{"text": "one, two", "label": "yes"}\n\n{"text": "three", "label": "no"}\n',
    )
    rows = read_labelled(table)
    assert [(r.text, r.label, r.pair) for r in rows] == [("one, two", "yes", None), ("three", "no", None)]
    assert [r.where for r in rows] == [f"{table}:2", f"{table}:3"]
    assert [(r.text, r.label) for r in read_labelled(lines)] == [(r.text, r.label) for r in rows]
    assert labels_of(rows, "a.csv") == ("no", "yes")


def test_columns_are_chosen_labels_may_be_numbers_and_texts_may_be_pairs(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        '{"premise": "p", "hypothesis": "h", "gold": 0}\n{"premise": "p", "hypothesis": "k", "gold": true}\n',
    )
    rows = read_labelled(path, text_column="premise", pair_column="hypothesis", label_column="gold")
    assert [(r.text, r.pair, r.label) for r in rows] == [("p", "h", "0"), ("p", "k", "True")]
    assert rows[0].content != rows[1].content


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a", "labels": "x"}', r"a.jsonl:2: no column 'label' .*did you mean 'labels'\? set label_column"),
        ('{"sentence": "a", "label": "x"}', "no column 'text' .*set text_column to its name"),
        ('{"text": "  ", "label": "x"}', "a.jsonl:2: text is empty; fill it in or remove the row"),
        ('{"text": 3, "label": "x"}', "text is 3, not a text"),
        ('{"text": "a", "label": ""}', "a.jsonl:2: label is empty; every row needs a label"),
        ('{"text": "a", "label": null}', "label is empty"),
        ('{"text": "a", "label": 0.5}', "a label is a text or an integer"),
        ('{"text": "a", "label": ["x"]}', "a label is a text or an integer"),
    ],
)
def test_bad_rows_are_named(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "first", "label": "x"}\n' + text + "\n")
    with pytest.raises(DataError, match=says) as caught:
        read_labelled(path)
    assert "\n" not in str(caught.value)


def test_one_class_and_unknown_labels_are_refused() -> None:
    rows = [LabelledText("a", "north", where="t:1"), LabelledText("b", "north", where="t:2")]
    with pytest.raises(DataError, match="all 2 rows carry the label 'north'"):
        labels_of(rows, "t")
    with pytest.raises(DataError, match="d:7: label 'nort' does not occur in the training data; did you mean 'north'"):
        check_known([LabelledText("c", "nort", where="d:7")], ("north", "south"))


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def test_conll_by_spaces_and_tabs_and_windows_line_ends(tmp_path: Path) -> None:
    spaces = read_conll(written(tmp_path / "a.conll", CONLL))
    assert [s.words for s in spaces] == [("EU", "rejects", "German"), ("Peter", "Blackburn")]
    assert [s.tags for s in spaces] == [("B-ORG", "O", "B-MISC"), ("B-PER", "I-PER")]
    assert [s.where.rpartition(":")[2] for s in spaces] == ["3", "7"]
    body = CONLL.partition("\n\n")[2]
    tabs = read_conll(written(tmp_path / "b.conll", body.replace(" ", "\t").replace("\n", "\r\n")))
    assert [(s.words, s.tags) for s in tabs] == [(s.words, s.tags) for s in spaces]
    middle = read_conll(tmp_path / "a.conll", tag_column=1, scheme="none")
    assert middle[1].tags == ("NNP", "NNP")
    assert labels_of(spaces, "a") == ("B-MISC", "B-ORG", "B-PER", "I-PER", "O")


@pytest.mark.parametrize(
    ("text", "scheme", "says"),
    [
        ("a X O\nb O\n", "iob2", r"a.conll:2: 2 columns, line 1 has 3; every word needs the same columns"),
        ("a O\nb I-PER\n", "iob2", r"a.conll:2: tag 'I-PER' follows 'O', but in IOB2 .* set tag_scheme = iob1"),
        ("a B-LOC\nb I-PER\n", "iob2", "tag 'I-PER' follows 'B-LOC'"),
        ("a B-PER\n\nb I-PER\n", "iob2", r"a.conll:3: tag 'I-PER' follows 'O'"),
        ("a NNP\n", "iob2", "tag 'NNP' is not O, B-TYPE or I-TYPE; .* tag_scheme = none"),
        ("a B-\n", "iob2", "tag 'B-' is not O"),
        ("a O\nb B-PER\n", "iob1", r"tag 'B-PER' follows 'O', but in IOB1"),
        ("a\n", "iob2", "tag 'a' is not O"),
        ("a\t\n", "iob2", r"a.conll:1: column -1 \(tag_column\) is empty"),
        ("-DOCSTART- O\n\n", "iob2", "holds no sentences"),
    ],
)
def test_bad_columns_are_named(text: str, scheme: Scheme, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read_conll(written(tmp_path / "a.conll", text), scheme=scheme)
    assert "\n" not in str(caught.value)


def test_a_missing_column_and_a_missing_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.conll", "a O\n")
    with pytest.raises(DataError, match=r"a.conll:1: no column 4 \(tag_column\), the line has 2"):
        read_conll(path, tag_column=4)
    with pytest.raises(DataError, match="no such file"):
        read_conll(tmp_path / "none.conll")


def test_iob1_becomes_iob2(tmp_path: Path) -> None:
    path = written(tmp_path / "a.conll", "a I-PER\nb I-PER\nc B-PER\nd I-LOC\ne O\nf I-LOC\n")
    assert read_conll(path, scheme="iob1")[0].tags == ("B-PER", "I-PER", "B-PER", "B-LOC", "O", "B-LOC")


rows_of_text = st.lists(
    st.builds(LabelledText, st.text("ab", min_size=1, max_size=3), st.sampled_from(["x", "y", "z"])), max_size=30
)


@given(rows_of_text, st.floats(0.05, 0.9), st.integers(0, 3))
def test_a_split_keeps_contents_together_and_every_label_in_training(
    rows: list[LabelledText], share: float, seed: int
) -> None:
    try:
        kept, held = split_by_content(rows, share=share, seed=seed)
    except DataError:
        if len({r.content for r in rows}) == len(rows):
            assert max(Counter(r.label for r in rows).values(), default=0) < 2
        return
    assert Counter((r.text, r.label) for r in kept + held) == Counter((r.text, r.label) for r in rows)
    assert held
    assert count_copies(held, kept) == 0
    assert {r.label for r in kept} == {r.label for r in rows}
    again = split_by_content(list(reversed(rows)), share=share, seed=seed)
    assert {r.content for r in again[1]} == {r.content for r in held}


def test_a_split_is_stratified_and_the_seed_matters() -> None:
    rows = [LabelledText(f"{label} {i}", label) for label, n in (("x", 100), ("y", 20)) for i in range(n)]
    kept, held = split_by_content(rows, share=0.1, seed=0)
    assert Counter(r.label for r in held) == {"x": 10, "y": 2}
    assert len(kept) == 108
    assert {r.text for r in split_by_content(rows, share=0.1, seed=1)[1]} != {r.text for r in held}


def test_texts_that_repeat_are_no_small_number_of_rows() -> None:
    rows = [LabelledText("good", "x"), LabelledText("bad", "y")] * 40
    with pytest.raises(DataError, match=r"^80 rows have 2 different texts: too few to hold some out; give eval_data"):
        split_by_content(rows, share=0.1, seed=0)


@pytest.mark.parametrize("name", ["a.csv", "a.CSV"])
def test_a_column_that_is_not_there_is_a_matter_of_the_header(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, "words,label\nfine,x\n")
    with pytest.raises(
        DataError, match=rf"{name}:1: no column 'text' \(it has words, label\); set text_column to its name"
    ):
        read_labelled(path)
    with pytest.raises(DataError, match=rf"{name}:1: no column 'body' to take text from"):
        read_labelled(path, columns=("text=body",))
    with pytest.raises(DataError, match=rf"{name}:1: its keys \('label', 'words'\) are no known kind of record"):
        read_records(path)


def test_sentences_held_out_never_take_a_tag_away_from_training() -> None:
    rows = [TaggedSentence((f"w{i}",), ("B-RARE" if i == 3 else "O",)) for i in range(20)]
    for seed in range(10):
        kept, held = split_sentences(rows, share=0.4, seed=seed)
        assert any("B-RARE" in r.tags for r in kept)
        assert len(kept) + len(held) == 20
    with pytest.raises(DataError, match="too few"):
        split_sentences(rows[:1], share=0.4, seed=0)


def test_a_choice_takes_as_many_of_each_label() -> None:
    rows = [LabelledText(f"{label} {i % 7}", label) for label in "xy" for i in range(10)]
    for seed in range(5):
        chosen = stratified_choice(rows, per_label=3, seed=seed)
        assert Counter(r.label for r in chosen) == {"x": 3, "y": 3}
        assert len({r.content for r in chosen}) == 6
    assert len(stratified_choice(rows, per_label=99, seed=0)) == 14
    small = {r.content for r in stratified_choice(rows, per_label=1, seed=0)}
    assert small <= {r.content for r in stratified_choice(rows, per_label=3, seed=0)}


def test_rewards_by_hand_and_their_errors(tmp_path: Path) -> None:
    path = written(tmp_path / "r.json", json.dumps({"spam": {"spam": 2, "ham": -5}}))
    assert read_rewards(path, ("ham", "spam")) == [[1.0, 0.0], [-5.0, 2.0]]
    for table, says in (
        ({"spma": {}}, "label 'spma' does not occur in the training data; did you mean 'spam'"),
        ({"spam": {"hem": 1}}, "did you mean 'ham'"),
        ({"spam": {"ham": "5"}}, "the reward of 'ham' where 'spam' is right is '5', not a number"),
        ({"spam": 1}, "must be an object of objects"),
        ([1], "must be an object of objects"),
    ):
        with pytest.raises(DataError, match=says):
            read_rewards(written(path, json.dumps(table)), ("ham", "spam"))


def test_a_shuffle_follows_its_seed_and_not_the_file() -> None:
    rows = [LabelledText(f"text {i}", "xy"[i % 2]) for i in range(30)]
    found = [shuffled_by_content(rows, seed=seed) for seed in (0, 1)]
    assert shuffled_by_content(rows[::-1], seed=1) == found[1]
    assert found[0] != found[1]
    assert all(Counter(r.text for r in one) == Counter(r.text for r in rows) for one in found)


def test_every_row_that_was_trained_on_is_counted() -> None:
    """Also one that stands twice; another label makes no other input, another second text does."""
    train = [LabelledText("a", "x"), LabelledText("b", "x"), LabelledText("c", "x", pair="d")]
    held = [LabelledText(*row) for row in (("a", "x"), ("a", "y"), ("c", "x"), ("c", "y", "d"), ("e", "x"))]
    assert count_copies(held, train) == 3
