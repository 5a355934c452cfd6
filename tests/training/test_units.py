"""Losses over whole sequences: one denominator for the step, however the units are cut into micro-batches."""

from __future__ import annotations

import pytest
import torch

from upslope.training.step import Unit, unit_batches, weighted_mean
from upslope.types import Example


def unit(length: int, terms: int, value: float) -> Unit:
    tokens = list(range(2, 2 + length))
    return Unit((Example(tokens, [False] + [True] * (length - 1)),), {"value": value}, terms)


UNITS = [unit(4, 3, 1.0), unit(9, 1, 2.0), unit(5, 2, 4.0), unit(20, 1, 8.0)]


@pytest.mark.parametrize("budget", [1, 15, 100])
def test_the_step_is_divided_by_its_terms_and_by_nothing_of_a_micro_batch(budget: int) -> None:
    """(1 + 2 + 4 + 8) / (3 + 1 + 2 + 1 terms), each unit once and with its own value."""
    batches = unit_batches(UNITS, budget)
    assert len(batches) == {1: 4, 15: 3, 100: 1}[budget]
    assert sum(float((b.fields["value"] * b.fields["weight"]).sum()) for b in batches) == pytest.approx(15 / 7)
    found = {float(v): int(n) for b in batches for v, n in zip(b.fields["value"], lengths(b.sequence_N), strict=True)}
    assert found == {1.0: 3, 2.0: 8, 4.0: 4, 8.0: 19}


def lengths(sequence_N: torch.Tensor) -> torch.Tensor:
    return torch.bincount(sequence_N)


def test_what_is_measured_is_a_mean_over_terms() -> None:
    sums = {"loss": torch.tensor([3.0, 1.0, 2.0, 1.0]), "odd": torch.tensor([7.0, 0.0, 0.0, 7.0])}
    assert weighted_mean(sums, UNITS) == {"loss": 1.0, "odd": 2.0}
