"""Measures of labels per text and tags per word as reports, and the official metrics of GLUE and SuperGLUE.

Reports are plain dictionaries; scikit-learn counts the labels. Entities are counted as CoNLL's shared tasks do, in
strict IOB2 (the package seqeval's name for it): an entity is right when its type and both its ends are.

A metric takes what is right and what was said in the order of the items and gives an Interval over [0, 1] (of a
correlation over [-1, 1]): Wilson's 95% for shares, else the percentile bootstrap, over independent items.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from upslope.errors import DataError
from upslope.evaluation.measurement import Interval, bootstrap, bootstrap_mean, wilson
from upslope.extras import require
from upslope.rewards.functions import squad_f1, squad_words

AVERAGES = ("micro", "macro", "weighted")
TOKEN_TITLE = "token level, includes O"


def classification_report(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its interval, precision, recall, F1 and support per label and averaged, and the confusion matrix.

    Averages are over all of `labels`; a measure that would divide by zero is 0. confusion[i][j] counts rows of label i
    that were called label j. With one label per row micro precision, recall and F1 are the accuracy. DataError: no
    rows, or lengths differ.
    """
    right = accuracy(truth, predicted)
    metrics = require("eval", "sklearn.metrics")
    names = list(labels)
    scores = partial(metrics.precision_recall_fscore_support, truth, predicted, labels=names, zero_division=0)
    return {
        "accuracy": {**right._asdict(), "n": len(truth)},
        "labels": {name: _row(*values) for name, *values in zip(names, *scores(average=None), strict=True)},
        "averages": {average: _row(*scores(average=average)[:3], len(truth)) for average in AVERAGES},
        "confusion": {"labels": names, "counts": metrics.confusion_matrix(truth, predicted, labels=names).tolist()},
    }


def token_report(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """`classification_report` over all tokens of all sentences, O like any other tag, so easy O tokens lift it.

    Tokens of one sentence are not independent: the interval is narrower than it should be. Named by TOKEN_TITLE.
    """
    _check_sentences(truth, predicted)
    return {"title": TOKEN_TITLE, **classification_report(list(chain(*truth)), list(chain(*predicted)), labels)}


def entities_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities in one sentence's IOB2 tags as (first word, word after the last, type).

    B-X begins one and the I-X right behind it go on with it; an I-X that continues nothing is no entity.
    """
    found = set()
    start = kind = None
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if start is not None and not (prefix == "I" and name == kind):
            found.add((start, index, kind))
            start = None
        if prefix == "B":
            start, kind = index, name
    return found


def entity_report(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall, F1 and support of whole entities, per type and averaged (strict, IOB2).

    In `truth` every I-X follows B-X or I-X; what a model predicts need not: an entity that does not begin with B- is
    no entity. Where there is no entity in a type's denominator the measure is 0.
    """
    _check_sentences(truth, predicted)
    right, said, gold = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, said_tags in zip(truth, predicted, strict=True):
        true_entities, said_entities = entities_of(true_tags), entities_of(said_tags)
        gold.update(kind for *_, kind in true_entities)
        said.update(kind for *_, kind in said_entities)
        right.update(kind for *_, kind in true_entities & said_entities)
    rows = {kind: _counted(right[kind], said[kind], gold[kind]) for kind in sorted(said | gold)}
    averages = {"micro": _counted(right.total(), said.total(), gold.total())}
    for average, weights in (("macro", [1] * len(rows)), ("weighted", [row["support"] for row in rows.values()])):
        parts = [
            sum(row[name] * w for row, w in zip(rows.values(), weights, strict=True)) / (sum(weights) or 1)
            for name in ("precision", "recall", "f1")
        ]
        averages[average] = _row(*parts, gold.total())
    return {"title": "entity level, strict IOB2", "labels": rows, "averages": averages}


def format_report(report: Mapping[str, Any]) -> str:
    """A report as a plain table: label, precision, recall, F1, support, then the averages."""
    rows = [*report["labels"].items(), *((f"{a} average", row) for a, row in report["averages"].items())]
    width = max(len("label"), *(len(str(name)) for name, _ in rows))
    lines = [report.get("title") or "one label per row"]
    if "accuracy" in report:
        a = report["accuracy"]
        lines.append(f"accuracy {a['value']:.4f} [{a['low']:.4f}, {a['high']:.4f}] n={a['n']}")
    lines.append(f"{'label':<{width}}  precision  recall      f1  support")
    lines += [
        f"{name:<{width}}  {row['precision']:>9.4f}  {row['recall']:>6.4f}  {row['f1']:>6.4f}  {row['support']:>7}"
        for name, row in rows
    ]
    return "\n".join(lines)


def _counted(right: int, said: int, gold: int) -> dict[str, Any]:
    """Precision, recall and F1 from counts; 0 where there is nothing to divide by."""
    return _row(right / (said or 1), right / (gold or 1), 2 * right / (said + gold or 1), gold)


def _row(precision: float, recall: float, f1: float, support: int) -> dict[str, Any]:
    values = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {name: 0.0 if math.isnan(v) else v for name, v in values.items()} | {"support": int(support)}


def _check(truth: Sequence[object], said: Sequence[object]) -> None:
    if not truth or len(truth) != len(said):
        raise DataError(f"need as many predictions as rows, and at least one: {len(said)} and {len(truth)}")


def _check_sentences(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    _check(truth, predicted)
    for index, (a, b) in enumerate(zip(truth, predicted, strict=True)):
        if len(a) != len(b):
            raise DataError(f"sentence {index} has {len(a)} tags and {len(b)} predictions")


def accuracy(truth: Sequence[Any], said: Sequence[Any]) -> Interval:
    """Share of items said right."""
    _check(truth, said)
    return wilson(sum(t == s for t, s in zip(truth, said, strict=True)), len(truth))


def matthews(truth: Sequence[int], said: Sequence[int], *, seed: int = 0) -> Interval:
    """Matthews' correlation of two classes (CoLA); 0 where one side has a single class."""

    def correlation(counts_CC: np.ndarray) -> float:
        (tn, fp), (fn, tp) = counts_CC.tolist()
        scale = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / math.sqrt(scale) if scale else 0.0

    return _of_counts(correlation, truth, said, 2, seed)


def binary_f1(truth: Sequence[int], said: Sequence[int], *, seed: int = 0) -> Interval:
    """F1 of class 1 (MRPC, QQP); 0 where it is neither there nor said."""
    return _of_counts(lambda counts_CC: float(_f1_C(counts_CC)[1]), truth, said, 2, seed)


def macro_f1(truth: Sequence[int], said: Sequence[int], *, classes: int, seed: int = 0) -> Interval:
    """Unweighted mean of the classes' F1 (CB); a class that is neither there nor said counts 0."""
    return _of_counts(lambda counts_CC: float(_f1_C(counts_CC).mean()), truth, said, classes, seed)


def pearson(truth: Sequence[float], said: Sequence[float], *, seed: int = 0) -> Interval:
    """Pearson's correlation (STS-B); 0 where one side does not vary."""
    return _correlation(lambda x: x, truth, said, seed)


def spearman(truth: Sequence[float], said: Sequence[float], *, seed: int = 0) -> Interval:
    """Spearman's rank correlation (STS-B); 0 where one side does not vary."""
    return _correlation(require("eval", "scipy.stats").rankdata, truth, said, seed)


def grouped_f1(truth: Sequence[int], said: Sequence[int], groups: Sequence[str], *, seed: int = 0) -> Interval:
    """F1 of class 1 over all answers of all questions (MultiRC's F1a); questions are what is resampled."""
    _check(truth, said)
    counts = {group: np.zeros(2, dtype=np.int64) for group in groups}
    for right, answer, group in zip(truth, said, groups, strict=True):
        counts[group] += (right and answer, right + answer)
    table = np.array(list(counts.values()))

    def f1(chosen: np.ndarray) -> float:
        both, either = table[chosen].sum(axis=0)
        return 2 * both / either if either else 0.0

    return bootstrap(f1, len(table), seed=seed)


def grouped_exact(truth: Sequence[int], said: Sequence[int], groups: Sequence[str]) -> Interval:
    """Share of questions of which every answer was said right (MultiRC's exact match)."""
    _check(truth, said)
    right: dict[str, bool] = {}
    for t, s, group in zip(truth, said, groups, strict=True):
        right[group] = right.get(group, True) and t == s
    return wilson(sum(right.values()), len(right))


def cloze_exact(truth: Sequence[Sequence[str]], said: Sequence[str]) -> Interval:
    """Share of texts equal to one of their right ones, case, punctuation and articles aside (ReCoRD)."""
    _check(truth, said)
    hits = [any(squad_words(s) == squad_words(t) for t in answers) for answers, s in zip(truth, said, strict=True)]
    return wilson(sum(hits), len(hits))


def cloze_f1(truth: Sequence[Sequence[str]], said: Sequence[str], *, seed: int = 0) -> Interval:
    """Mean over texts of the F1 of their words against the best of the right ones (ReCoRD)."""
    _check(truth, said)
    best = [max(squad_f1(s, t) for t in answers) for answers, s in zip(truth, said, strict=True)]
    return bootstrap_mean(best, seed=seed)


def _f1_C(counts_CC: np.ndarray) -> np.ndarray:
    """2 right / (there + said) of every class."""
    both = 2.0 * counts_CC.diagonal()
    either = counts_CC.sum(axis=0) + counts_CC.sum(axis=1)
    return np.divide(both, either, out=np.zeros(len(both)), where=either > 0)


def _of_counts(
    statistic: Callable[[np.ndarray], float], truth: Sequence[int], said: Sequence[int], classes: int, seed: int
) -> Interval:
    """The bootstrap of a function of the confusion counts: counts_CC[t, s] items of class t that were called s."""
    _check(truth, said)
    cells_N = np.asarray(truth, dtype=np.int64) * classes + np.asarray(said, dtype=np.int64)

    def of(places: np.ndarray) -> float:
        return statistic(np.bincount(cells_N[places], minlength=classes**2).reshape(classes, classes))

    return bootstrap(of, len(cells_N), seed=seed)


def _correlation(
    scale: Callable[[np.ndarray], np.ndarray], truth: Sequence[float], said: Sequence[float], seed: int
) -> Interval:
    """Pearson's correlation of what `scale` makes of each side: ranks for Spearman's, ties sharing their mean rank."""
    _check(truth, said)
    t_N, s_N = np.asarray(truth, dtype=np.float64), np.asarray(said, dtype=np.float64)

    def correlation(places: np.ndarray) -> float:
        t, s = (scale(x[places]) for x in (t_N, s_N))
        if np.ptp(t) == 0 or np.ptp(s) == 0:
            return 0.0
        t, s = t - t.mean(), s - s.mean()
        return float(t @ s / math.sqrt((t @ t) * (s @ s)))

    return bootstrap(correlation, len(t_N), seed=seed)
