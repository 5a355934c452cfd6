"""Rescoring with a stand-in for the scorer (orders by hand) and with a real tiny model (log-probs by hand)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_model import tiny_folder

from upslope.build import load_inference
from upslope.errors import ConfigError, DataError
from upslope.evaluation.measurement import Figure
from upslope.evaluation.metrics import bleu_metric
from upslope.evaluation.rescore import GRID, NBest, read_nbest, rescore
from upslope.evaluation.scorer import Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("rescore") / "m")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    policy = load_inference(folder, dtype="float32")
    return Scorer(policy.model, policy.tokenizer)


def written(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def figures(found: Sequence[object]) -> dict[str, Figure]:
    return {m.name: m if isinstance(m, Figure) else m.figure(resamples=20) for m in found}  # type: ignore[attr-defined]


def nbest(tmp_path: Path, rows: Sequence[object]) -> list[NBest]:
    return read_nbest(written(tmp_path / "n.jsonl", rows))


def total(scorer: Scorer, text: str) -> tuple[float, int]:
    """log p(text, EOS) after the prefix, and its tokens, by one plain call."""
    ids = [*scorer.tokenizer(text, add_special_tokens=False)["input_ids"], scorer.tokenizer.eos_token_id]
    return scorer.loglikelihood([((), ids)])[0][0], len(ids)


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5, 30.0])
def test_the_order_is_that_of_the_totals(
    scorer: Scorer, tmp_path: Path, length_normalized: bool, weight: float
) -> None:
    options = ["the cat sat", "a much longer cat sat down there", "", "cat", "the mat"]
    rows = [
        {
            "reference": options[(i + 1) % 5],
            "hypotheses": [{"text": t, "score": -float((j * 7 + i) % 5)} for j, t in enumerate(options)],
        }
        for i in range(4)
    ]
    lists = nbest(tmp_path, rows)
    said, before = [], []
    for entry in lists:
        scores = []
        for h in entry.hypotheses:
            logp, n = total(scorer, h.text)
            scores.append((logp / n if length_normalized else logp) + weight * (h.score or 0.0))
        said.append(entry.hypotheses[scores.index(max(scores))].text)
        before.append(max(entry.hypotheses, key=lambda h: h.score or 0.0).text)
    found = figures(rescore(scorer, lists, dataset="n", length_normalized=length_normalized, weight=weight))
    words = [entry.references[0].split() for entry in lists]
    assert found["wer/after"].value == pytest.approx(_wer(said, words))
    assert found["wer/before"].value == pytest.approx(_wer(before, words))
    assert found["wer/oracle"].value == 0.0
    references = [[entry.references[0] for entry in lists]]
    assert found["bleu/after"].value == pytest.approx(bleu_metric("en").corpus_score(said, references).score)
    assert found["wer/change"].value == pytest.approx(found["wer/after"].value - found["wer/before"].value)
    assert found["wer/after"].detail["score_weight"] == weight


def _wer(said: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    return sum(_edits(s.split(), r) for s, r in zip(said, right, strict=True)) / sum(map(len, right))


def _edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's recursion as it is written in books."""
    if not a or not b:
        return len(a) + len(b)
    return min(_edits(a[1:], b) + 1, _edits(a, b[1:]) + 1, _edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_a_source_is_the_context(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{"source": "ein haus = ", "reference": "a house", "hypotheses": [{"text": "a house"}, {"text": "house b"}]}]
    asked: list[object] = []
    real = scorer.score

    class Spy(Scorer):
        def score(self, requests):
            asked.extend(requests)
            return real(requests)

    rescore(Spy(scorer.model, scorer.tokenizer), nbest(tmp_path, rows), dataset="n")
    encode = scorer.tokenizer.encode
    eos = scorer.tokenizer.eos_token_id
    assert asked == [
        (encode("ein haus = "), [*encode("a house"), eos]),
        (encode("ein haus = "), [*encode("house b"), eos]),
    ]


def test_without_scores_the_list_s_order_counts(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{"id": 7, "reference": "b", "hypotheses": ["a", "b"]}, {"references": ["c", "d"], "hypotheses": ["d"]}]
    found = figures(rescore(scorer, nbest(tmp_path, rows), dataset="n"))
    assert found["wer/before"].value == 0.5
    assert found["wer/oracle"].value == 0.0


def test_a_tuned_weight_is_chosen_on_other_lists(scorer: Scorer, tmp_path: Path) -> None:
    """The right text is long, so the bare log-prob avoids it; its own score is the best: a weight is needed."""
    rows = [
        {"reference": f"right one number {i}", "hypotheses": [{"text": "x", "score": -9.0}, right]}
        for i in range(20)
        if (right := {"text": f"right one number {i}", "score": 0.0})
    ]
    found = figures(rescore(scorer, nbest(tmp_path, rows), dataset="n", weight="tuned"))
    assert found["wer/after"].n == 10
    detail = found["wer/after"].detail
    assert detail["tuned_on"] == 10
    assert found["wer/after"].value == 0.0
    margin = max(total(scorer, "x")[0] - total(scorer, f"right one number {i}")[0] for i in range(20)) / 9
    assert detail["score_weight"] == next(w for w in GRID if w > margin)  # the smallest that does it
    bare = figures(rescore(scorer, nbest(tmp_path, rows), dataset="n"))
    assert bare["wer/after"].value == 1.0


def test_chinese_is_counted_in_characters(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{"reference": "今天天气好", "hypotheses": ["今天气好"]}]
    found = figures(rescore(scorer, nbest(tmp_path, rows), dataset="n", language="zh"))
    assert found["cer/after"].value == pytest.approx(1 / 5)
    assert "tok:zh" in found["bleu/after"].detail["signature"]


def test_a_row_that_does_not_fit_is_named(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{"reference": "a", "hypotheses": ["a", "b " * 400]}]
    with pytest.raises(DataError, match=r"n.jsonl:1: hypotheses\[1\]: a continuation of 801 tokens does not fit"):
        rescore(scorer, nbest(tmp_path, rows), dataset="n")


def test_a_weight_needs_scores(scorer: Scorer, tmp_path: Path) -> None:
    lists = nbest(tmp_path, [{"reference": "a", "hypotheses": ["a"]}])
    with pytest.raises(ConfigError, match="have no 'score'"):
        rescore(scorer, lists, dataset="n", weight=0.5)
    scored = nbest(tmp_path, [{"reference": "a", "hypotheses": [{"text": "a", "score": 1}]}])
    with pytest.raises(ConfigError, match="one list cannot both tune"):
        rescore(scorer, scored, dataset="n", weight="tuned")


GOOD = {"reference": "a", "hypotheses": [{"text": "a", "score": 1.0}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"hypotheses": ["a"]}, "'reference' must be a text"),
        ({"reference": 3, "hypotheses": ["a"]}, "'reference' must be a text"),
        ({"references": [], "hypotheses": ["a"]}, "'reference' must be a text"),
        ({"reference": "a"}, "'hypotheses' must be a list"),
        ({"reference": "a", "hypotheses": []}, "'hypotheses' must be a list"),
        ({"reference": "a", "hypotheses": [{"score": 1}]}, r"hypotheses\[0\] must be an object with 'text'"),
        ({"reference": "a", "hypotheses": [{"text": "a", "logp": 1}]}, r"hypotheses\[0\] must be an object"),
        ({"reference": "a", "hypotheses": [{"text": "a", "score": "1"}]}, "'score' must be a finite number"),
        ({"reference": "a", "hypotheses": [{"text": "a", "score": math.nan}]}, "'score' must be a finite number"),
        ({"reference": "a", "hypotheses": [{"text": "a", "score": True}]}, "'score' must be a finite number"),
        ({"reference": "a", "hypotheses": ["a"]}, "some hypotheses have a 'score' and others none"),
        ({"reference": "a", "hypotheses": ["a"], "sauce": "b"}, "unknown key 'sauce'"),
        ({"reference": "a", "hypotheses": ["a"], "source": ""}, "'source' must be a text"),
        ([1], "each line must be one JSON object"),
    ],
)
def test_rubbish_is_refused_with_its_row(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"n\.jsonl:2.*{message}"):
        nbest(tmp_path, [GOOD, row])
