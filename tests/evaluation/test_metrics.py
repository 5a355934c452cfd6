"""Metrics against the packages they stand on, called directly, and against hand-computed values."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from upslope.errors import ConfigError, DataError
from upslope.evaluation.metrics import METRICS, Texts, bleu_metric, check_metrics, measure

SAID = [
    "The quick brown fox jumped over the lazy dog.",
    "It is  a guide to action which ensures that the military always obeys the command of the party.",
    "",
    "He said hello.",
    "completely different words here",
]
RIGHT = [
    ("The fast brown fox jumped over the lazy dog .", "A quick brown fox leaps over a lazy dog."),
    ("It is a guide to action that ensures that the military will forever heed Party commands.",),
    ("An empty answer meets this.",),
    ("He said hello.", "He greeted us.", "Hello, he said."),
    ("nothing shared at all",),
]
CHINESE = (["今天天气很好。", "我喜欢吃苹果和香蕉"], [("今天的天气很好。",), ("我爱吃苹果、香蕉。",)])


def texts(said: Sequence[str], right: Sequence[tuple[str, ...]], language: str = "en") -> Texts:
    return Texts("data.jsonl", said, right, [f"data.jsonl:{i}" for i in range(1, len(said) + 1)], language)


def value(name: str, said: Sequence[str], right: Sequence[tuple[str, ...]], language: str = "en") -> float:
    (found,) = measure([name], texts(said, right, language))
    return found.figure(resamples=5).value


def streams(right: Sequence[tuple[str, ...]]) -> list[list[str | None]]:
    return [[r[i] if i < len(r) else None for r in right] for i in range(max(map(len, right)))]


@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "ter"])
def test_translation_metrics_are_sacrebleus(name: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF, TER

    metric = {"bleu": BLEU(), "chrf": CHRF(), "chrf++": CHRF(word_order=2), "ter": TER()}[name]
    # three references a sentence: sacrebleu's own check allows gaps in all streams but the first
    expected = metric.corpus_score(SAID, streams(RIGHT))
    (found,) = measure([name], texts(SAID, RIGHT))
    figure = found.figure(resamples=50)
    assert figure.value == pytest.approx(expected.score, abs=1e-12)
    assert figure.low <= figure.value <= figure.high
    assert figure.detail["signature"] == str(metric.get_signature())
    assert figure.better == ("lower" if name == "ter" else "higher")


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_chinese_has_its_own_tokenizers(name: str) -> None:
    from sacrebleu.metrics import BLEU, CHRF, TER

    metric = {"bleu": BLEU(tokenize="zh"), "chrf": CHRF(), "ter": TER(normalized=True, asian_support=True)}[name]
    said, right = CHINESE
    assert value(name, said, right, "zh") == pytest.approx(metric.corpus_score(said, streams(right)).score, abs=1e-12)


def test_chinese_bleu_is_not_the_default_ones() -> None:
    said, right = CHINESE
    assert value("bleu", said, right, "zh") > value("bleu", said, right, "en") + 10
    (found,) = measure(["bleu"], texts(said, right, "zh"))
    assert "tok:zh" in found.detail["signature"]


def test_a_resample_is_sacrebleu_on_the_resampled_sentences() -> None:
    from sacrebleu.metrics import BLEU

    (found,) = measure(["bleu"], texts(SAID, RIGHT))
    places = [0, 0, 3, 1, 3]
    expected = BLEU().corpus_score([SAID[i] for i in places], streams([RIGHT[i] for i in places])).score
    assert found.value(found.statistics_NK[places].sum(axis=0)) == pytest.approx(expected, abs=1e-12)


def test_japanese_bleu_wants_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    import sacrebleu.metrics

    def refuse(**_: object) -> None:
        raise RuntimeError("Japanese tokenization requires extra dependencies")

    monkeypatch.setattr(sacrebleu.metrics, "BLEU", refuse)
    with pytest.raises(ConfigError, match=r"language 'ja'.*pip install 'sacrebleu\[ja\]', or take chrf"):
        check_metrics(["bleu"], "ja")
    check_metrics(["chrf"], "ja")


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name])
    best = [max(scorer.score(r, s)[name].fmeasure for r in rs) for s, rs in zip(SAID, RIGHT, strict=True)]
    assert value(name, SAID, RIGHT) == pytest.approx(sum(best) / len(best))


def test_rouge_of_chinese_counts_characters() -> None:
    # 天 气 好 against 天 气 很 好: 3 shared of 3 and 4; bigrams 天气 of 2 and 3
    assert value("rouge1", ["天气好"], [("天气很好",)], "zh") == pytest.approx(2 * 3 / (3 + 4))
    assert value("rouge2", ["天气好"], [("天气很好",)], "zh") == pytest.approx(2 * 1 / (2 + 3))
    # a word of letters stays one, and accents count: 4 words against 5, 4 shared
    assert value("rougeL", ["用GPU很快"], [("用GPU很快吗",)], "zh") == pytest.approx(2 * 4 / (4 + 5))
    assert value("rouge1", ["Été à Orléans"], [("été à orleans",)], "fr") == pytest.approx(2 / 3)


def test_answers_are_compared_as_squad_does() -> None:
    said = ["The Eiffel Tower!", "in 1889, the", "Paris", ""]
    right = [("eiffel tower",), ("1889", "in 1889"), ("London",), ("something",)]
    assert value("exact_match", said, right) == 2 / 4
    assert value("token_f1", ["the big red barn"], [("a red barn door",)]) == pytest.approx(2 * 2 / (3 + 3))
    assert value("token_f1", said, right) == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_labels_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(0)
    truth = [draw.choice(["cat", "dog", "emu"]) for _ in range(200)]
    said = [t if draw.random() < 0.6 else draw.choice(["cat", "dog", "emu", "no idea"]) for t in truth]
    right = [(t,) for t in truth]
    assert value("accuracy", [f" {s}\n" for s in said], right) == accuracy_score(truth, said)
    expected = f1_score(truth, said, labels=["cat", "dog", "emu"], average="macro")
    (found,) = measure(["macro_f1"], texts(said, right))
    assert found.figure(resamples=200).value == pytest.approx(expected, abs=1e-12)
    for name, row in found.detail["labels"].items():
        assert row["f1"] == pytest.approx(f1_score(truth, said, labels=[name], average="macro"))


def test_a_label_missing_from_a_resample_is_left_out() -> None:
    (found,) = measure(["macro_f1"], texts(["a", "b"], [("a",), ("b",)]))
    assert found.figure(resamples=100).low == 1.0  # resamples of one label only are right too


def test_entities_are_the_tag_reports() -> None:
    """The F1 of `tag`, whose own tests compare it with seqeval: 2 right of 3 said and 3 true."""
    truth, said = ["B-PER I-PER O B-LOC", "B-PER O"], ["B-PER I-PER O B-LOC", "I-PER B-LOC"]
    assert value("entity_f1", said, [(t,) for t in truth]) == pytest.approx(2 * 2 / (3 + 3))


def test_error_rates_by_hand() -> None:
    # 1 substitution + 1 deletion of 4 words; 2 insertions to 1 word
    said, right = ["the cat sit", "a b c"], [("the cat sat down",), ("a",)]
    assert value("wer", said, right) == pytest.approx((2 + 2) / (4 + 1))
    assert value("cer", ["今天气好"], [("今天天气好",)]) == pytest.approx(1 / 5)
    assert value("wer", ["a b"], [("x y z", "a b")]) == 0.0


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"no metric is called 'belu'; did you mean 'bleu'\?; known: bleu, chrf"):
        check_metrics(["belu"], "en")
    with pytest.raises(DataError, match=r"data.jsonl:1: accuracy compares with one reference, this row has 2"):
        measure(["accuracy"], texts(["a"], [("a", "b")]))
    with pytest.raises(DataError, match=r"data.jsonl:2: 1 tags where the reference has 2"):
        measure(["entity_f1"], texts(["O", "O"], [("O",), ("O O",)]))
    with pytest.raises(DataError, match=r"'PER' is no IOB2 tag"):
        measure(["entity_f1"], texts(["PER"], [("O",)]))
    with pytest.raises(DataError, match="neither side has an entity"):
        measure(["entity_f1"], texts(["O"], [("O",)]))
    with pytest.raises(DataError, match="the references are empty"):
        measure(["wer"], texts(["a"], [("",)]))
    with pytest.raises(DataError, match="nothing to judge"):
        measure(["bleu"], texts([], []))


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"entity_f1", "wer", "cer"}))
def test_any_text_gets_a_finite_figure(name: str) -> None:
    odd = ["", " ", "\n", "\x00", "\U0001d54f 🙂", "a" * 500, "‏עברית", "B-PER", "<unk> @-@"]
    right = [(x,) for x in reversed(odd)]
    figure = measure([name], texts(odd, right))[0].figure(resamples=20)
    assert all(x == x and abs(x) < 1e6 for x in (figure.value, figure.low, figure.high))


def test_sentence_bleu_counts_the_orders_there_are() -> None:
    assert bleu_metric("zh", sentence=True).sentence_score("很好", ["很好"]).score == pytest.approx(100.0)
