from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError
from upslope.training.optim import ScheduleKind, learning_rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", [1.0, 2.0, 3.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]),
    ],
)
def test_the_table_of_a_short_run(kind: ScheduleKind, expected: list[float]) -> None:
    rates = [learning_rate(step, base=4.0, total_steps=11, warmup_steps=3, kind=kind) for step in range(13)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_cosine_by_hand() -> None:
    rates = [learning_rate(step, base=1.0, total_steps=4, kind="cosine") for step in range(6)]
    half = math.sqrt(0.5) / 2
    assert rates == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half, 0.0, 0.0], abs=1e-12)


kinds = st.sampled_from(["linear", "cosine"])


@given(kinds, st.integers(1, 400), st.floats(0, 0.9))
def test_it_rises_then_falls_to_nothing(kind: ScheduleKind, total: int, warmup: float) -> None:
    top = math.ceil(warmup * total)
    rates = [learning_rate(s, base=2.0, total_steps=total, warmup_steps=top, kind=kind) for s in range(total + 2)]
    assert rates[total] == rates[total + 1] == pytest.approx(0.0, abs=1e-12)
    assert all(0.0 < value <= 2.0 for value in rates[:total])
    assert all(a < b for a, b in pairwise(rates[: min(top + 1, total)]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    if top < total:
        assert rates[top] == 2.0


@given(kinds, st.integers(0, 50))
def test_it_has_no_jumps(kind: ScheduleKind, warmup: int) -> None:
    total = 1000
    rates = [learning_rate(s, base=1.0, total_steps=total, warmup_steps=warmup, kind=kind) for s in range(total + 1)]
    largest = max(abs(a - b) for a, b in pairwise(rates))
    assert largest <= max(1 / (warmup + 1) if warmup else 0.0, math.pi / 2 / (total - warmup)) + 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "poly"}, "'poly' is not one of constant, linear, cosine"),
        ({"total_steps": 0}, "total_steps 0"),
        ({"warmup_steps": 11}, "11 exceeds"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"base": math.nan}, "learning rate nan"),
        ({"step": -1}, "step -1"),
    ],
)
def test_bad_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate(**{"step": 0, "base": 1.0, "total_steps": 10, **options})  # type: ignore[arg-type]
