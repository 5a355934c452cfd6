"""The official metrics of GLUE and SuperGLUE with their intervals.

Every function takes what is right and what was said in the order of the items, and gives Intervals over [0, 1] (the
correlations over [-1, 1]): Wilson's for shares, else the percentile bootstrap over independent items.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from upslope.errors import DataError
from upslope.evaluation.intervals import Interval, bootstrap, bootstrap_mean, wilson
from upslope.extras import require
from upslope.rewards.functions import squad_words


def accuracy(truth: Sequence[int], said: Sequence[int]) -> Interval:
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
    places: dict[str, int] = {}
    counts: list[list[int]] = []
    for right, answer, group in zip(truth, said, groups, strict=True):
        if group not in places:
            places[group] = len(counts)
            counts.append([0, 0])
        counts[places[group]][0] += right and answer
        counts[places[group]][1] += right + answer
    table = np.array(counts)

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
    best = [max(_word_f1(s, t) for t in answers) for answers, s in zip(truth, said, strict=True)]
    return bootstrap_mean(best, seed=seed)


def _word_f1(said: str, right: str) -> float:
    left, other = Counter(squad_words(said)), Counter(squad_words(right))
    if not left or not other:
        return float(left == other)
    return 2 * (left & other).total() / (left.total() + other.total())


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


def _check(truth: Sequence[object], said: Sequence[object]) -> None:
    if not truth or len(truth) != len(said):
        raise DataError(f"need as many answers as items, and at least one: {len(said)} and {len(truth)}")
