"""Calibration by hand and at its two ends."""

from __future__ import annotations

import pytest

from upslope.evaluation.behaviour import calibration


def test_by_hand() -> None:
    found = calibration([0.95, 0.95, 0.15, 0.15], [True, False, False, False])
    assert found["ece"] == pytest.approx(0.5 * abs(0.5 - 0.95) + 0.5 * abs(0.0 - 0.15))
    assert found["brier"] == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.15**2) / 4)
    assert [(b["count"], b["accuracy"]) for b in found["bins"]] == [(2, 0.0), (2, 0.5)]


def test_perfect_and_worst() -> None:
    assert calibration([1.0, 0.0], [True, False])["ece"] == 0.0
    assert calibration([1.0, 0.0], [False, True])["ece"] == 1.0
    assert calibration([1.0, 0.0], [False, True])["brier"] == 1.0


def test_order_does_not_matter() -> None:
    pairs = [(i / 37, i % 3 == 0) for i in range(37)]
    forward = calibration(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    backward = calibration(*map(list, zip(*pairs[::-1], strict=True)))  # type: ignore[arg-type]
    assert forward == backward


@pytest.mark.parametrize(
    ("sure", "right"), [([], []), ([0.5], [True, False]), ([1.2], [True]), ([float("nan")], [True])]
)
def test_rubbish_is_refused(sure: list[float], right: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"confidence|verdicts"):
        calibration(sure, right)
