"""Reports against numbers counted by hand."""

from __future__ import annotations

import pytest

from upslope.errors import DataError
from upslope.evaluation.classification import (
    TOKEN_TITLE,
    classification_report,
    entity_report,
    format_report,
    token_report,
)

TRUTH = ["a", "a", "a", "a", "b", "b", "b", "c", "c", "c"]
SAID = ["a", "a", "a", "b", "b", "b", "a", "c", "a", "a"]


def test_labels_by_hand() -> None:
    report = classification_report(TRUTH, SAID, ["a", "b", "c"])
    assert report["accuracy"]["value"] == 0.6
    assert report["accuracy"]["n"] == 10
    # Wilson, z = 1.96: (0.6 + 0.19207 +- 1.96 sqrt(0.024 + 0.0096)) / 1.38415
    assert report["accuracy"]["low"] == pytest.approx(0.3127, abs=2e-4)
    assert report["accuracy"]["high"] == pytest.approx(0.8318, abs=2e-4)
    a, b, c = (report["labels"][x] for x in "abc")
    assert (a["precision"], a["recall"], a["support"]) == (0.5, 0.75, 4)
    assert a["f1"] == pytest.approx(0.6)
    assert (b["precision"], b["recall"], b["support"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert (c["precision"], c["recall"]) == (1.0, pytest.approx(1 / 3))
    assert c["f1"] == pytest.approx(0.5)
    averages = report["averages"]
    assert averages["micro"]["f1"] == pytest.approx(0.6)
    assert averages["macro"]["f1"] == pytest.approx((0.6 + 2 / 3 + 0.5) / 3)
    assert averages["weighted"]["f1"] == pytest.approx((4 * 0.6 + 3 * 2 / 3 + 3 * 0.5) / 10)
    assert report["confusion"]["counts"] == [[3, 1, 0], [1, 2, 0], [2, 0, 1]]


def test_a_label_that_is_never_said_nor_true_counts_zero() -> None:
    report = classification_report(["a", "b"], ["a", "a"], ["a", "b", "z"])
    assert report["labels"]["z"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert report["averages"]["macro"]["recall"] == pytest.approx(1 / 3)


ENTITY_TRUTH = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O", "B-PER"], ["O", "O"]]
ENTITY_SAID = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "I-ORG", "B-PER"], ["O", "I-LOC"]]


def test_entities_by_hand_need_both_ends_and_a_beginning() -> None:
    """PER: one of two found, the other cut short. LOC: found, and a lone I-LOC is no entity. ORG: too long."""
    report = entity_report(ENTITY_TRUTH, ENTITY_SAID)
    assert report["labels"]["LOC"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert report["labels"]["PER"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert report["labels"]["ORG"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert report["averages"]["micro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 4}
    assert report["averages"]["macro"]["f1"] == pytest.approx(0.5)
    assert report["averages"]["weighted"]["f1"] == pytest.approx((1 + 2 * 0.5 + 0) / 4)


def test_tokens_by_hand_flatter_and_say_so() -> None:
    labels = ["B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER", "O"]
    report = token_report(ENTITY_TRUTH, ENTITY_SAID, labels)
    assert report["title"] == TOKEN_TITLE == "token level, includes O"
    assert report["accuracy"]["value"] == pytest.approx(6 / 9)
    assert report["labels"]["O"] == {"precision": 2 / 3, "recall": 0.5, "f1": pytest.approx(4 / 7), "support": 4}
    assert report["labels"]["B-PER"]["f1"] == 1.0
    assert report["labels"]["I-PER"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert report["averages"]["micro"]["f1"] == pytest.approx(6 / 9)
    text = format_report(report)
    assert text.splitlines()[0] == "token level, includes O"
    assert any(line.split()[0] == "O" for line in text.splitlines()[2:])


def test_a_high_token_score_can_hide_that_no_entity_was_found() -> None:
    truth, said = [["O"] * 97 + ["B-PER", "I-PER", "I-PER"]], [["O"] * 97 + ["B-PER", "I-PER", "O"]]
    assert token_report(truth, said, ["B-PER", "I-PER", "O"])["averages"]["micro"]["f1"] == 0.99
    assert entity_report(truth, said)["averages"]["micro"]["f1"] == 0.0


def test_text_without_entities_is_zero_not_an_error() -> None:
    report = entity_report([["O", "O"]], [["O", "O"]])
    assert report["labels"] == {}
    assert report["averages"]["micro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    only_said = entity_report([["O", "O"]], [["B-X", "O"]])
    assert only_said["labels"]["X"]["precision"] == 0.0


def test_the_table_has_a_line_per_label_and_average() -> None:
    lines = format_report(classification_report(TRUTH, SAID, ["a", "b", "c"])).splitlines()
    assert lines[1].startswith("accuracy 0.6000 [0.31")
    assert [line.split()[0] for line in lines[3:]] == ["a", "b", "c", "micro", "macro", "weighted"]
    assert lines[3].split() == ["a", "0.5000", "0.7500", "0.6000", "4"]


def test_lengths_must_fit() -> None:
    with pytest.raises(DataError, match="as many predictions as rows"):
        classification_report(["a"], [], ["a"])
    with pytest.raises(DataError, match="sentence 0 has 2 tags and 1 predictions"):
        entity_report([["O", "O"]], [["O"]])
