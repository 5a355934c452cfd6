"""One measured number with its interval: what every evaluation returns, and what tables and JSON are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
