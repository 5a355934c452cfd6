"""A number with its interval, as a function of per-item statistics: so its bootstrap and the paired one are possible.

BLEU is not a mean over sentences, but it is a function of sums over sentences, and so is every other measure here
(Koehn 2004, "Statistical significance tests for machine translation evaluation", resamples these sums).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from upslope.evaluation.intervals import bootstrap, wilson

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
        if self.value is ratio and _is_share(self.statistics_NK):
            interval, how = wilson(int(self.statistics_NK[:, 0].sum()), self.n), "Wilson"
        else:
            with np.errstate(invalid="ignore"):  # quantiles between infinite values
                interval = bootstrap(self._at(range(self.n)), self.n, resamples=resamples, seed=seed)
            how = f"bootstrap over {self.n} {self.unit}, {resamples} resamples"
        detail = {**self.detail, "interval": how}
        return Figure(self.name, *interval, self.n, self.dataset, self.better, detail)

    def interval(self) -> dict[str, Any]:
        """{"value", "low", "high", "n"}: the figure as run folders keep it; without items all but n are NaN."""
        if not self.n:
            return {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
        figure = self.figure()
        return {"value": figure.value, "low": figure.low, "high": figure.high, "n": figure.n}

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


def _is_share(statistics_NK: np.ndarray) -> bool:
    return bool(np.isin(statistics_NK[:, 0], (0.0, 1.0)).all() and (statistics_NK[:, 1] == 1.0).all())
