from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError
from upslope.training.schedule import ScheduleKind, learning_rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]),
        ("linear", [1.0, 2.0, 3.0, 4.0, 3.625, 3.25, 2.875, 2.5, 2.125, 1.75, 1.375, 1.0, 1.0]),
        ("wsd", [1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.25, 2.5, 1.75, 1.0, 1.0]),
    ],
)
def test_the_table_of_a_short_run(kind: ScheduleKind, expected: list[float]) -> None:
    rates = [
        learning_rate(step, base=4.0, total_steps=11, warmup_steps=3, kind=kind, min_ratio=0.25, decay_ratio=4 / 11)
        for step in range(13)
    ]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_cosine_by_hand() -> None:
    rates = [learning_rate(step, base=1.0, total_steps=4, kind="cosine", min_ratio=0.5) for step in range(6)]
    half = math.sqrt(0.5) / 4
    assert rates == pytest.approx([1.0, 0.75 + half, 0.75, 0.75 - half, 0.5, 0.5], abs=1e-12)


kinds = st.sampled_from(["linear", "cosine", "wsd"])


@given(kinds, st.integers(1, 400), st.floats(0, 0.9), st.floats(0, 1), st.floats(0.01, 1))
def test_it_rises_then_falls_to_its_last_value(
    kind: ScheduleKind, total: int, warmup: float, low: float, decay: float
) -> None:
    def rate(step: int) -> float:
        return learning_rate(
            step, base=2.0, total_steps=total, warmup_ratio=warmup, kind=kind, min_ratio=low, decay_ratio=decay
        )

    rates = [rate(step) for step in range(total + 2)]
    top = math.ceil(warmup * total)
    assert rates[total] == rates[total + 1] == pytest.approx(2.0 * low, abs=1e-12)
    assert all(0.0 < value <= 2.0 for value in rates[:total])
    assert all(a < b for a, b in pairwise(rates[: min(top + 1, total)]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[top:]))
    if top < total:
        assert rates[top] == 2.0


@given(kinds, st.integers(0, 50))
def test_it_has_no_jumps(kind: ScheduleKind, warmup: int) -> None:
    total = 1000
    rates = [
        learning_rate(s, base=1.0, total_steps=total, warmup_steps=warmup, kind=kind, decay_ratio=0.5)
        for s in range(total + 1)
    ]
    largest = max(abs(a - b) for a, b in pairwise(rates))
    assert largest <= max(1 / (warmup + 1) if warmup else 0.0, math.pi / 2 / (total - warmup), 2 / total) + 1e-12


def test_a_run_of_unknown_length_is_constant() -> None:
    assert [learning_rate(s, base=1.0, kind="constant", warmup_steps=1) for s in (0, 1, 10**9)] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "poly"}, "'poly' is not one of constant, linear, cosine, wsd"),
        ({"total_steps": None}, "needs total_steps"),
        ({"total_steps": 0}, "total_steps 0"),
        ({"warmup_steps": 11}, "11 exceeds"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "exclude each other"),
        ({"warmup_ratio": 1.5}, "warmup_ratio 1.5"),
        ({"min_ratio": -0.1}, "min_ratio -0.1"),
        ({"decay_ratio": 0.0}, "decay_ratio 0.0"),
        ({"base": math.nan}, "learning rate nan"),
        ({"step": -1}, "step -1"),
        ({"kind": "constant", "total_steps": None, "warmup_ratio": 0.1}, "warmup_ratio needs total_steps"),
    ],
)
def test_bad_values_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate(**{"step": 0, "base": 1.0, "total_steps": 10, **options})  # type: ignore[arg-type]
