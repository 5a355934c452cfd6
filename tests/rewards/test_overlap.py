"""Overlap rewards: by hand, against the textbook's table and other libraries, and total on rubbish."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.errors import ConfigError
from upslope.rewards.functions import edit_distance, nearest, references_of
from upslope.rewards.summands import load_reward
from upslope.types import Prompt

OVERLAP = ["bleu", "chrf", "edit_similarity", "ngram_overlap", "rouge", "token_f1"]


def table_distance(a: Any, b: Any) -> int:
    """The definition: Wagner and Fischer's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def judge(spec: str, completion: str, *references: str, text: str = "the question") -> Any:
    prompt = Prompt(1, text=text, answer=references[0] if references else None, metadata={"references": references})
    (value,) = load_reward(spec).function([prompt], [completion])
    return value


@given(st.text("abc", max_size=80), st.text("abc", max_size=80))
def test_edit_distance_is_the_textbooks(a: str, b: str) -> None:
    assert edit_distance(a, b) == table_distance(a, b)


@given(st.lists(st.integers(0, 3), max_size=70), st.lists(st.integers(0, 3), max_size=70))
def test_edit_distance_of_any_units_is_a_metric(a: list[int], b: list[int]) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == table_distance(a, b)
    assert (edit_distance(a, b) == 0) == (a == b)


def test_edit_distance_is_quick_on_long_texts() -> None:
    import time

    started = time.perf_counter()
    assert edit_distance("ab" * 10_000, "ba" * 10_000) == 2
    assert time.perf_counter() - started < 10


def test_by_hand() -> None:
    assert judge("edit_similarity", "K AE T", "K AE T S") == pytest.approx(0.75)
    assert judge("edit_similarity:unit=characters", "kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert judge("edit_similarity", "a b c d e f", "x") == 0.0
    assert judge("edit_similarity", "a b", "x y", "a c") == pytest.approx(0.5)  # the nearer of two references
    # bigrams of "the cat sat" / "the cat ran off": 2 and 3, one shared
    assert judge("ngram_overlap", "The cat sat", "the cat ran off") == pytest.approx(2 * 1 / (2 + 3))
    assert judge("ngram_overlap:n=1", "a a b", "a b b") == pytest.approx(2 * 2 / 6)
    assert judge("ngram_overlap", "one", "one") == 1.0
    assert judge("ngram_overlap:n=1,against=prompt", "the answer", text="the question") == pytest.approx(0.5)
    # SQuAD: "cat sat" (article and full stop gone) against "cat sat down"
    assert judge("token_f1", "The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert judge("token_f1", "the", "A!") == 1.0


def test_bleu_and_chrf_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="extra tasks")
    text, references = "the cat sat on the mat today", ("the cat sat on a mat", "today a cat sat on the mat")
    expected = sacrebleu.sentence_bleu(text, list(references), use_effective_order=True).score / 100
    assert judge("bleu", text, *references) == pytest.approx(expected)
    expected = sacrebleu.sentence_chrf(text, list(references)).score / 100
    assert judge("chrf", text, *references) == pytest.approx(expected)
    assert judge("chrf:word_order=2", "same words", "same words") == pytest.approx(1.0)
    assert judge("bleu:tokenize=none", "a b c d", "a b c d") == pytest.approx(1.0)
    # effective order: a reply of three words has no 4-grams, and is still perfect
    assert judge("bleu", "a b c", "a b c") == pytest.approx(1.0)


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score", reason="extra tasks")
    # longest common subsequence "police the gunman" (3) of 4 and 4 words
    assert judge("rouge", "police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert judge("rouge:kind=rouge2", "police kill the gunman", "police killed the gunman") == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", OVERLAP)
@settings(max_examples=40, deadline=None)
@given(
    st.text(st.characters(codec=None), max_size=40)
    | st.sampled_from(["", " ", "\x00", "\ud800", "\n" * 9, "a" * 3000]),
    st.text(max_size=30),
)
def test_total_on_rubbish(name: str, completion: str, reference: str) -> None:
    pytest.importorskip("sacrebleu", reason="extra tasks")
    pytest.importorskip("rouge_score", reason="extra tasks")
    value = judge(name, completion, reference)
    assert math.isfinite(value)
    assert -1e-9 <= value <= 1 + 1e-9


@pytest.mark.parametrize("name", OVERLAP)
def test_a_text_is_like_itself_and_no_reference_is_no_verdict(name: str) -> None:
    text = "four score and seven years ago our fathers"
    assert judge(name, text, text) == pytest.approx(1.0)
    assert load_reward(name).function([Prompt(1, text="x")], ["y"]) == [None]
    assert load_reward(name).inline_safe == (name != "rouge")


def test_references_of() -> None:
    assert references_of(Prompt(1, text="x")) == ()
    assert references_of(Prompt(1, text="x", answer="y")) == ("y",)
    assert references_of(Prompt(1, text="x", answer="y", metadata={"references": ["y", "z"]})) == ("y", "z")
    assert nearest("a b", ["a b c", "b"]) == (1, 3)


@pytest.mark.parametrize(
    ("spec", "needle"),
    [
        ("edit_similarity:unit=lines", "words or characters"),
        ("ngram_overlap:n=0", "at least 1"),
        ("ngram_overlap:against=me", "answer or prompt"),
        ("bleu:tokenize=zh", "13a, char"),
        ("chrf:word_order=9", "0, 1, 2"),
        ("rouge:kind=rouge9", "rouge1, rouge2"),
    ],
)
def test_wrong_parameters(spec: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        judge(spec, "a", "a")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from upslope.rewards import functions as overlap

    for module, spec in (("sacrebleu", "bleu:tokenize=intl"), ("rouge_score", "rouge:kind=rougeLsum")):
        monkeypatch.setitem(sys.modules, module, None)
        overlap._metric.cache_clear()
        with pytest.raises(ConfigError, match=rf"{module} is not installed; run: pip install 'upslope\[tasks\]'"):
            judge(spec, "a", "a")
