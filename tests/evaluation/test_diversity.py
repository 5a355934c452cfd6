"""Diversity by hand, against the plain definition, and what must not change it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.evaluation.behaviour import distinct_n, diversity, self_bleu, unique_share

TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join), min_size=2, max_size=7)


def bleu(text: str, references: Sequence[str], *, order: int = 4) -> float:
    """Sentence BLEU of one text against references, unsmoothed, over the n-gram orders the text has (2002, Papineni).

    Geometric mean of the clipped n-gram precisions for n = 1..min(order, words), times the brevity penalty against
    the reference of the nearest length (the shorter of two equally near). An order without a match gives 0; an empty
    text scores 1 beside an empty reference, else 0.
    """
    words, others = text.split(), [reference.split() for reference in references]
    if not words:
        return float([] in others)
    logs = []
    for n in range(1, min(order, len(words)) + 1):
        own, *counted = (Counter(zip(*(ws[i:] for i in range(n)), strict=False)) for ws in (words, *others))
        matched = sum(min(count, max(c[gram] for c in counted)) for gram, count in own.items())
        if not matched:
            return 0.0
        logs.append(math.log(matched / own.total()))
    nearest = min(map(len, others), key=lambda other: (abs(other - len(words)), other))
    return math.exp(min(0.0, 1.0 - nearest / len(words)) + sum(logs) / len(logs))


def test_distinct_by_hand() -> None:
    # a b a | b a: words a b a b a -> 2 of 5; pairs ab ba | ba -> 2 of 3
    assert distinct_n(["a b a", "b  a"], 1) == 2 / 5
    assert distinct_n(["a b a", "b  a"], 2) == 2 / 3
    assert distinct_n(["a", ""], 2) == 0
    assert distinct_n([], 1) == 0


def test_unique_share_by_hand() -> None:
    assert unique_share(["a b", "a  b ", "b a"]) == 2 / 3
    assert unique_share([]) == 1


def test_bleu_by_hand() -> None:
    # 1-grams: the(2, at most 1 in the reference) cat -> 2/3; 2-grams: "the cat" of two -> 1/2; the reference is longer
    assert bleu("the the cat", ["the cat sat down"], order=2) == pytest.approx(
        math.exp(1 - 4 / 3) * math.sqrt(2 / 3 * 1 / 2)
    )
    assert bleu("a b", ["a b", "c"], order=4) == 1.0  # only the orders the text has
    assert bleu("a b", ["b a"], order=4) == 0.0  # no pair in common
    assert bleu("", ["a"]) == 0.0
    assert bleu("", ["", "a"]) == 1.0
    # the nearest reference counts for brevity: length 2 against 1 and 3, the shorter of the two
    assert bleu("a b", ["a", "a b c"], order=1) == 1.0


def test_self_bleu_by_hand() -> None:
    assert self_bleu(["x y z"] * 4) == 1.0
    assert self_bleu(["a b", "c d"]) == 0.0
    assert self_bleu(["a b"]) == 0.0
    # {a b, a b, c d}: the first two score 1, the third 0
    assert self_bleu(["a b", "a b", "c d"]) == pytest.approx(2 / 3)


@given(TEXTS, st.integers(1, 4))
def test_self_bleu_is_the_mean_of_bleu_against_the_others(texts: list[str], order: int) -> None:
    each = [bleu(t, texts[:i] + texts[i + 1 :], order=order) for i, t in enumerate(texts)]
    assert self_bleu(texts, order=order) == pytest.approx(sum(each) / len(each))


@given(TEXTS, st.randoms())
def test_order_changes_nothing_and_all_lie_in_the_unit_interval(texts: list[str], random: object) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    ours, theirs = diversity(texts), diversity(shuffled)
    assert theirs == pytest.approx(ours)
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in ours.values())


def test_sample_repeats_and_is_bounded() -> None:
    texts = [f"word{i % 7} then {i}" for i in range(200)]
    assert self_bleu(texts, sample=20, seed=3) == self_bleu(texts, sample=20, seed=3)
    assert self_bleu(texts, sample=500) == self_bleu(texts)


@pytest.mark.parametrize("call", [lambda: distinct_n([], 0), lambda: self_bleu([], order=0)])
def test_wrong_arguments_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match="at least"):
        call()  # type: ignore[operator]
