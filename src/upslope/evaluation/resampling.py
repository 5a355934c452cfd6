"""The bootstrap of a statistic that is no mean: F1, a correlation, a corpus score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from upslope.evaluation.intervals import Interval, _draws

__all__ = ["bootstrap"]


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Percentile bootstrap (Efron 1979) of `statistic`, a function of the places 0..n-1 of the items to be counted.

    Items are drawn as in `intervals.bootstrap_mean`, so the same seed gives the same interval anywhere. A resample in
    which the statistic is undefined (NaN) is left out of the quantiles. ValueError: no items, resamples < 1.
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"need at least one item and one resample, got {n} and {resamples}")
    value = float(statistic(np.arange(n)))
    found = [float(statistic(_draws(np.array([k], dtype=np.uint64), n, seed)[0])) for k in range(resamples)]
    tail = (1 - confidence) / 2
    kept = [x for x in found if x == x]
    low, high = np.quantile(kept, [tail, 1 - tail]) if kept else (value, value)
    return Interval(value, float(low), float(high))
