"""Texts against references: translation, summaries, answers, labels, entities, each by the field's own package.

Every metric gives per-item statistics whose sums its figure is a function of (`Measurement`), so all have an interval,
and two systems on the same items a paired difference. BLEU, chrF and TER stand on sacrebleu's scale of 0 to 100, all
others on 0 to 1.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from upslope.config import suggestion
from upslope.errors import ConfigError, DataError
from upslope.evaluation.classification import classification_report, entities_of
from upslope.evaluation.measurement import Measurement, mean_of, ratio
from upslope.extras import require
from upslope.rewards.functions import nearest, squad_f1, squad_words

SPACELESS = ("zh", "ja")
"""Languages whose words no white space parts: ROUGE and error rates count characters there."""
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and Han characters
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


@dataclass(frozen=True, slots=True)
class Texts:
    """n hypotheses, each with one reference or more; `where` says where each stands."""

    dataset: str
    hypotheses: Sequence[str]
    references: Sequence[tuple[str, ...]]
    where: Sequence[str]
    language: str = "en"

    @property
    def pairs(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each hypothesis with its references."""
        return list(zip(self.hypotheses, self.references, strict=True))

    def single(self, metric: str) -> list[str]:
        """The one reference of each. DataError where there are several."""
        for where, references in zip(self.where, self.references, strict=True):
            if len(references) != 1:
                raise DataError(f"{where}: {metric} compares with one reference, this row has {len(references)}")
        return [references[0] for references in self.references]


def check_metrics(names: Sequence[str], language: str) -> None:
    """ConfigError for a metric that is not known, a package that is missing, or a language without its tokenizer."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"no metric is called '{name}'{suggestion(name, METRICS)}; known: {', '.join(METRICS)}")
    if "bleu" in names:
        bleu_metric(language)


def measure(names: Sequence[str], texts: Texts) -> list[Measurement]:
    """The named metrics of the texts. Raises as `check_metrics`, and DataError for a row that a metric cannot judge."""
    check_metrics(names, texts.language)
    if not texts.hypotheses:
        raise DataError(f"{texts.dataset}: there is nothing to judge")
    return [METRICS[name](name, texts) for name in dict.fromkeys(names)]


def _sacrebleu(name: str, texts: Texts) -> Measurement:
    metrics = require("eval", "sacrebleu.metrics")
    spaceless = texts.language in (*SPACELESS, "ko")
    metric = {
        "bleu": lambda: bleu_metric(texts.language),
        "chrf": metrics.CHRF,
        "chrf++": lambda: metrics.CHRF(word_order=2),
        "ter": lambda: metrics.TER(normalized=spaceless, asian_support=spaceless),
    }[name]()
    most = max(map(len, texts.references))
    streams = [[r[i] if i < len(r) else None for r in texts.references] for i in range(most)]
    rows = metric._extract_corpus_statistics(list(texts.hypotheses), streams)
    number = float if name == "ter" else int

    def value(sums_K: np.ndarray) -> float:
        return float(metric._compute_score_from_stats([number(x) for x in sums_K]).score)

    detail = {"signature": str(metric.get_signature()), "scale": 100}
    better = "lower" if name == "ter" else "higher"
    return Measurement(name, np.array(rows, dtype=np.float64), value, texts.dataset, better, "sentences", None, detail)


def bleu_metric(language: str, *, sentence: bool = False) -> Any:
    """sacrebleu's BLEU with the tokenizer of the language; `sentence` counts the n-gram orders that a sentence has.

    ConfigError: the tokenizer of Japanese or Korean is not installed.
    """
    tokenize = {"ja": "ja-mecab", "ko": "ko-mecab", "zh": "zh"}.get(language, "13a")
    try:
        return require("eval", "sacrebleu.metrics").BLEU(tokenize=tokenize, effective_order=sentence)
    except RuntimeError as error:
        raise ConfigError(
            f"BLEU of language '{language}' needs sacrebleu's MeCab: pip install 'sacrebleu[{language}]', or take chrf"
        ) from error


class _Words:
    """Case-folded runs of letters and digits of any alphabet; each Chinese or Japanese character is a word."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text.casefold())


def _nearest(
    name: str, texts: Texts, score: Callable[[str, str], float], *, unit: str, detail: Mapping[str, Any]
) -> Measurement:
    """The mean over texts of the score (text, reference) with the best of the references."""
    values = [max(float(score(text, reference)) for reference in references) for text, references in texts.pairs]
    return mean_of(name, values, dataset=texts.dataset, unit=unit, detail=detail)


def _rouge(name: str, texts: Texts) -> Measurement:
    english = texts.language == "en"
    words = "rouge-score's words ([a-z0-9]+)" if english else "words of any alphabet, characters of Chinese"
    scorer = require("eval", "rouge_score.rouge_scorer").RougeScorer([name], tokenizer=None if english else _Words())
    detail = {"tokenizer": words, "measure": "F1"}
    return _nearest(
        name, texts, lambda text, right: scorer.score(right, text)[name].fmeasure, unit="texts", detail=detail
    )


def _labels(name: str, texts: Texts) -> list[tuple[str, str]]:
    """(right, said) of each text, white space at both ends aside."""
    return [(r.strip(), h.strip()) for r, h in zip(texts.single(name), texts.hypotheses, strict=True)]


def _macro_f1(name: str, texts: Texts) -> Measurement:
    """Mean over the reference labels of 2 TP / (2 TP + FP + FN), as scikit-learn's f1_score(average="macro").

    A text that is no label costs recall and makes no class of its own. In a resample, a label that neither occurs nor
    is predicted has no F1 and is left out.
    """
    truth, said = zip(*_labels(name, texts), strict=True)
    labels = sorted(set(truth))
    gold_NC, said_NC = (np.array(side)[:, None] == np.array(labels)[None, :] for side in (truth, said))
    statistics_NK = np.concatenate([gold_NC & said_NC, gold_NC, said_NC], axis=1).astype(np.float64)

    def value(sums_K: np.ndarray) -> float:
        hit_C, gold_C, said_C = np.split(sums_K, 3)
        there = gold_C + said_C > 0
        return float((2 * hit_C[there] / (gold_C + said_C)[there]).mean())

    report = classification_report(truth, said, labels)["labels"]
    return Measurement(name, statistics_NK, value, texts.dataset, "higher", "labels", None, {"labels": report})


def _entity_f1(name: str, texts: Texts) -> Measurement:
    """Micro F1 of whole entities (strict, IOB2); white space parts the tags."""
    rows = []
    for where, said, right in zip(texts.where, texts.hypotheses, texts.single(name), strict=True):
        said_tags, right_tags = said.split(), right.split()
        if len(said_tags) != len(right_tags):
            raise DataError(f"{where}: {len(said_tags)} tags where the reference has {len(right_tags)}: one per word")
        for tag in {*said_tags, *right_tags}:
            if tag != "O" and not re.fullmatch(r"[BI]-\S+", tag):
                raise DataError(f"{where}: {tag!r} is no IOB2 tag; entity_f1 wants O, B-TYPE and I-TYPE")
        found, wanted = entities_of(said_tags), entities_of(right_tags)
        rows.append((2 * len(found & wanted), len(found) + len(wanted)))
    statistics_N2 = np.array(rows, dtype=np.float64)
    if not statistics_N2[:, 1].sum():
        raise DataError(f"{texts.dataset}: neither side has an entity, so there is no F1 of them")
    return Measurement(
        name, statistics_N2, ratio, texts.dataset, "higher", "sentences", None, {"scheme": "IOB2 strict"}
    )


def _error_rate(name: str, texts: Texts) -> Measurement:
    """Edits over reference length (Levenshtein 1966), against the nearest reference, of words or characters."""
    unit = "characters" if name == "cer" else "words"
    pairs = [nearest(t, r, unit=unit) for t, r in texts.pairs]
    if not sum(length for _, length in pairs):
        raise DataError(f"{texts.dataset}: the references are empty, so there is no error rate")
    rows = np.array(pairs, dtype=np.float64)
    return Measurement(name, rows, ratio, texts.dataset, "lower", "sentences", None, {"unit": unit})


_SQUAD = {"unit": "answers", "detail": {"normalised": "SQuAD"}}
METRICS: dict[str, Callable[[str, Texts], Measurement]] = {
    **dict.fromkeys(("bleu", "chrf", "chrf++", "ter"), _sacrebleu),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), _rouge),
    "exact_match": partial(_nearest, score=lambda text, right: squad_words(text) == squad_words(right), **_SQUAD),
    "token_f1": partial(_nearest, score=squad_f1, **_SQUAD),
    "accuracy": lambda name, texts: mean_of(
        name, [float(t == s) for t, s in _labels(name, texts)], dataset=texts.dataset, unit="labels"
    ),
    "macro_f1": _macro_f1,
    "entity_f1": _entity_f1,
    "wer": _error_rate,
    "cer": _error_rate,
}
"""Every metric by the name that --metrics takes."""
