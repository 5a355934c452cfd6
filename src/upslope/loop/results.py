"""What a learner tells the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Evaluation", "StepResult"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step reports: metrics for the log, trained tokens for the budget."""

    metrics: Mapping[str, float]
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A held-out measurement; `best`, patience and target go by the metric called `measure`.

    loss: of two evaluations of equal value the one with the lower loss is the better one; None: the earlier.
    """

    measure: str
    metrics: Mapping[str, Any]
    loss: float | None = None

    @property
    def value(self) -> float:
        """The number of `measure`."""
        found = self.metrics[self.measure]
        return float(found["value"] if isinstance(found, Mapping) else found)
