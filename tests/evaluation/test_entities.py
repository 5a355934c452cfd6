"""Whole entities against their definition, and against what seqeval 1.2.2 counts (strict, IOB2): recorded, and live."""

from __future__ import annotations

import random
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.evaluation.classification import entities_of, entity_report

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
Sentences = list[list[str]]

# What `seqevals(*drawn(seed))` printed: precision, recall and F1 per type and average, and the support.
RECORDED: dict[int, dict[str, tuple[float, float, float, int]]] = {
    0: {
        "LOC": (0.7936508, 0.8196721, 0.8064516, 183),
        "PER": (0.7419355, 0.7142857, 0.7278481, 161),
        "micro": (0.7703488, 0.7703488, 0.7703488, 344),
        "macro": (0.7677931, 0.7669789, 0.7671499, 344),
        "weighted": (0.7694468, 0.7703488, 0.7696633, 344),
    },
    1: {
        "LOC": (0.7500000, 0.7407407, 0.7453416, 162),
        "PER": (0.7777778, 0.7924528, 0.7850467, 159),
        "micro": (0.7639752, 0.7663551, 0.7651633, 321),
        "macro": (0.7638889, 0.7665968, 0.7651942, 321),
        "weighted": (0.7637591, 0.7663551, 0.7650086, 321),
    },
    2: {
        "LOC": (0.7783019, 0.7568807, 0.7674419, 218),
        "PER": (0.8115942, 0.8038278, 0.8076923, 209),
        "micro": (0.7947494, 0.7798595, 0.7872340, 427),
        "macro": (0.7949480, 0.7803542, 0.7875671, 427),
        "weighted": (0.7945972, 0.7798595, 0.7871429, 427),
    },
    3: {
        "LOC": (0.8235294, 0.8115942, 0.8175182, 207),
        "PER": (0.7591623, 0.7837838, 0.7712766, 185),
        "micro": (0.7924051, 0.7984694, 0.7954257, 392),
        "macro": (0.7913459, 0.7976890, 0.7943974, 392),
        "weighted": (0.7931521, 0.7984694, 0.7956950, 392),
    },
}


def drawn(seed: int, sentences: int = 60) -> tuple[Sentences, Sentences]:
    """Well-formed truth, and predictions that copy 80% of it and break the scheme elsewhere."""
    draw = random.Random(seed)
    truth: Sentences = []
    for _ in range(sentences):
        row: list[str] = []
        for _ in range(draw.randint(1, 30)):
            tag = draw.choice(TAGS)
            row.append("O" if tag[0] == "I" and (not row or row[-1][1:] != tag[1:]) else tag)
        truth.append(row)
    said = [[tag if draw.random() < 0.8 else draw.choice(TAGS) for tag in row] for row in truth]
    return truth, said


def seqevals(truth: Sentences, said: Sentences) -> dict[str, tuple[float, float, float, int]]:
    """The same table by the package."""
    v1 = pytest.importorskip("seqeval.metrics.v1", reason="compares with seqeval: pip install seqeval==1.2.2")
    from seqeval.scheme import IOB2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = {"scheme": IOB2, "zero_division": 0}
        columns = v1.precision_recall_fscore_support(truth, said, average=None, **counted)
        table = {kind: tuple(column[i].item() for column in columns) for i, kind in enumerate(["LOC", "PER"])}
        for average in ("micro", "macro", "weighted"):
            values = v1.precision_recall_fscore_support(truth, said, average=average, **counted)
            table[average] = (*map(float, values[:3]), int(columns[3].sum()))
    return table


def ours(truth: Sentences, said: Sentences) -> dict[str, tuple[float, float, float, int]]:
    report = entity_report(truth, said)
    return {name: tuple(row.values()) for name, row in {**report["labels"], **report["averages"]}.items()}


@pytest.mark.parametrize("seed", RECORDED)
def test_the_recorded_counts_of_seqeval(seed: int) -> None:
    found = ours(*drawn(seed))
    assert list(found) == list(RECORDED[seed])
    for name, row in RECORDED[seed].items():
        assert found[name] == pytest.approx(row, abs=5e-7), name


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(100, 130))
def test_the_counts_of_seqeval(seed: int) -> None:
    truth, said = drawn(seed)
    expected = seqevals(truth, said)
    found = ours(truth, said)
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, abs=1e-12), name


@given(st.lists(st.sampled_from([*TAGS, "I-ORG", "B-a-b", "I-a-b", "E-PER"]), max_size=12))
def test_the_definition(tags: list[str]) -> None:
    """An entity of type X is a stretch [i, j): B-X at i, I-X on the rest of it, and no I-X at j."""
    expected = {
        (i, j, tags[i][2:])
        for i in range(len(tags))
        for j in range(i + 1, len(tags) + 1)
        if tags[i][0] == "B"
        and all(tag == f"I-{tags[i][2:]}" for tag in tags[i + 1 : j])
        and tags[j : j + 1] != [f"I-{tags[i][2:]}"]
    }
    assert entities_of(tags) == expected


def test_by_hand() -> None:
    assert entities_of(["B-PER", "I-PER", "O", "B-LOC"]) == {(0, 2, "PER"), (3, 4, "LOC")}
    assert entities_of(["B-PER", "I-LOC", "I-LOC"]) == {(0, 1, "PER")}  # another type continues nothing
    assert entities_of(["B-PER", "B-PER", "I-PER"]) == {(0, 1, "PER"), (1, 3, "PER")}
    assert entities_of(["O", "I-PER"]) == set()
    assert entities_of([]) == set()
