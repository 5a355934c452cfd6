"""Confidence intervals for what an evaluation counts. Free of torch; the same seed gives the same interval anywhere."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

_TAILS = [(1 - 0.95) / 2, 1 - (1 - 0.95) / 2]  # of the bootstrap: 95%


class Interval(NamedTuple):
    """An estimate and its confidence limits; unpacks as (value, low, high)."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): right also near 0 and 1 and for small n.

    Centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    ValueError: not 0 <= successes <= n, n < 1, confidence outside (0, 1).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need n >= 1 and 0 <= successes <= n, got successes={successes}, n={n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # the formula is exact at both ends; rounding is not
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(p, low, high)


def bootstrap_mean(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean (Efron 1979).

    Which items resample k draws depends on (seed, k, position) alone: no generator has state, and a longer run
    repeats the shorter one's resamples. ValueError: no values, a value not finite, resamples < 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"need at least one value, all finite, in one dimension; got shape {list(x.shape)}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    means = np.empty(resamples)
    rows = max(1, 1_000_000 // x.size)
    for start in range(0, resamples, rows):
        ids = np.arange(start, min(start + rows, resamples), dtype=np.uint64)
        means[start : start + rows] = x[_draws(ids, x.size, seed)].mean(axis=1)
    low, high = np.quantile(means, _TAILS)
    return Interval(float(x.mean()), float(low), float(high))


def paired_bootstrap(
    after: Sequence[float], before: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap of mean(after - before), both measured on the same problems in the same order.

    Pairing removes the problems' own difficulty from the noise, so the interval is narrower than two separate ones.
    ValueError: lengths differ, or as in `bootstrap_mean`.
    """
    if len(after) != len(before):
        raise ValueError(f"paired values must be equally many, got {len(after)} and {len(before)}")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_mean(difference.tolist(), resamples=resamples, seed=seed)


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron 1979) of `statistic`, a function of the places 0..n-1 of the items to be counted.

    Items are drawn as in `bootstrap_mean`, so the same seed gives the same interval anywhere. A resample in
    which the statistic is undefined (NaN) is left out of the quantiles. ValueError: no items, resamples < 1.
    """
    if n < 1 or resamples < 1:
        raise ValueError(f"need at least one item and one resample, got {n} and {resamples}")
    value = float(statistic(np.arange(n)))
    found = [float(statistic(_draws(np.array([k], dtype=np.uint64), n, seed)[0])) for k in range(resamples)]
    kept = [x for x in found if x == x]
    low, high = np.quantile(kept, _TAILS) if kept else (value, value)
    return Interval(value, float(low), float(high))


def share(values: Sequence[float], seed: int) -> Interval:
    """The mean of values that are 0, 1 or between: Wilson's interval where none is between, else the bootstrap's."""
    if all(x in (0.0, 1.0) for x in values):
        return wilson(int(sum(values)), len(values))
    return bootstrap_mean(values, seed=seed)


def _draws(resample_ids: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Indices in 0..n-1, one row of n per resample, from SplitMix64's mixer applied to a counter."""
    key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    row_keys = _mix(resample_ids + key)[:, None]
    bits = _mix(row_keys + np.arange(1, n + 1, dtype=np.uint64)[None, :])
    # 32 random bits scaled to n: the bias is below n / 2^32
    return (((bits >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers that passes for random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
