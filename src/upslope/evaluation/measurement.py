"""A number with its interval, as a function of per-item statistics: so its bootstrap and the paired one are possible.

BLEU is not a mean over sentences, but it is a function of sums over sentences, and so is every other measure here
(Koehn 2004, "Statistical significance tests for machine translation evaluation", resamples these sums). Free of torch;
the same seed gives the same interval anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, NamedTuple, TypeVar

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """`value` with its 95% interval low to high over n independent items (documents, problems, pairs).

    name: of the metric in the field's own words ("bleu", "accuracy", "token_perplexity"); dataset: what it was
    measured on; better: "higher" or "lower". detail: whatever makes the number repeatable, such as sacrebleu's
    signature, counts, or the error line of what could not be judged.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    dataset: str = ""
    better: str = "higher"
    detail: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The figure as a JSON object; a number that is not finite becomes null, which JSON has and infinity is not."""
        fields = {**asdict(self), "detail": dict(self.detail)}
        numbers = {name: fields[name] for name in ("value", "low", "high")}
        return fields | {name: x if math.isfinite(x) else None for name, x in numbers.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """`value` of the summed rows of statistics_NK, over n items of which row i holds what item i adds.

    unit: what the items are ("sentences"). keys: the items' identities, by which two models' items are paired; left
    out: their places. The other fields go to the Figure.
    """

    name: str
    statistics_NK: np.ndarray
    value: Callable[[np.ndarray], float]
    dataset: str = ""
    better: str = "higher"
    unit: str = "items"
    keys: Sequence[Hashable] | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many items."""
        return len(self.statistics_NK)

    def figure(self, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
        """The value with its 95% interval: Wilson's for a share of items, else the bootstrap over items."""
        hits_N, weights_N = self.statistics_NK.T[:2]
        if self.value is ratio and np.isin(hits_N, (0.0, 1.0)).all() and (weights_N == 1.0).all():
            interval, how = wilson(int(hits_N.sum()), self.n), "Wilson"
        else:
            with np.errstate(invalid="ignore"):  # quantiles between infinite values
                interval = bootstrap(self._at(range(self.n)), self.n, resamples=resamples, seed=seed)
            how = f"bootstrap over {self.n} {self.unit}, {resamples} resamples"
        return Figure(self.name, *interval, self.n, self.dataset, self.better, detail={**self.detail, "interval": how})

    def interval(self) -> dict[str, Any]:
        """{"value", "low", "high", "n"}: the figure as run folders keep it; without items all but n are NaN."""
        figure = self.figure() if self.n else Figure(self.name, math.nan, math.nan, math.nan, 0)
        return {name: getattr(figure, name) for name in ("value", "low", "high", "n")}

    def difference(self, base: Measurement, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure | None:
        """This value minus that of `base` on the items both have, with its paired bootstrap interval; None: no item."""
        places = {key: i for i, key in enumerate(base.keys or range(base.n))}
        pairs = [(i, places[key]) for i, key in enumerate(self.keys or range(self.n)) if key in places]
        if not pairs:
            return None
        own, other = (side._at(column) for side, column in zip((self, base), zip(*pairs, strict=True), strict=True))
        interval = bootstrap(lambda at: own(at) - other(at), len(pairs), resamples=resamples, seed=seed)
        detail = {**self.detail, "interval": f"paired bootstrap over {len(pairs)} {self.unit}, {resamples} resamples"}
        return Figure(self.name, *interval, len(pairs), self.dataset, self.better, detail)

    def _at(self, chosen: Sequence[int]) -> Callable[[np.ndarray], float]:
        """places in `chosen` -> the value over those items."""
        rows_NK = self.statistics_NK[np.asarray(chosen)]
        return lambda at: float(self.value(rows_NK[at].sum(axis=0)))


Measured = TypeVar("Measured", bound=Measurement | Figure)


def noted(found: Sequence[Measured], **details: Any) -> list[Measured]:
    """The same with further details, such as how many items what was named holds (`of`, of which n may be a part)."""
    return [replace(one, detail={**one.detail, **details}) for one in found]


def ratio(sums_K: np.ndarray) -> float:
    """First sum over second: a mean where the second column is all ones. NaN where that is 0."""
    return float(sums_K[0] / sums_K[1]) if sums_K[1] else float("nan")


def mean_of(name: str, values: Sequence[float], **fields: Any) -> Measurement:
    """The mean of one number per item."""
    column_N = np.asarray(values, dtype=np.float64)
    return Measurement(name, np.stack([column_N, np.ones_like(column_N)], axis=1), ratio, **fields)


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
