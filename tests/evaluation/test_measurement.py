"""Figures from per-item statistics: intervals by definition, pairing, shares, and what may go wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from upslope.evaluation.measurement import Figure, Measurement, bootstrap_mean, mean_of, paired_bootstrap, ratio, wilson


def test_a_mean_has_the_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    figure = mean_of("x", values, unit="texts").figure(resamples=500, seed=3)
    expected = bootstrap_mean(values, resamples=500, seed=3)
    assert (figure.value, figure.low, figure.high) == pytest.approx(tuple(expected), abs=1e-12)
    assert figure.n == 40
    assert figure.detail["interval"] == "bootstrap over 40 texts, 500 resamples"


def test_a_share_has_wilsons_interval() -> None:
    figure = mean_of("accuracy", [0.0] * 7 + [1.0] * 3).figure()
    assert (figure.value, figure.low, figure.high) == tuple(wilson(3, 10))
    assert figure.detail["interval"] == "Wilson"
    assert mean_of("accuracy", [0.0] * 5).figure().high > 0.3  # five failures are no proof of 0


def test_a_ratio_resamples_the_sums() -> None:
    rows = np.array([[3.0, 10.0], [0.0, 5.0], [9.0, 9.0], [1.0, 40.0]])
    figure = Measurement("wer", rows, ratio).figure(resamples=2000, seed=1)
    assert figure.value == 13 / 64
    from upslope.evaluation.measurement import _draws

    picked = rows[_draws(np.arange(2000, dtype=np.uint64), 4, 1)].sum(axis=1)
    assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(picked[:, 0] / picked[:, 1], [0.025, 0.975])))


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(size=60) * 10
    before, after = hard, hard + 1 + 0.1 * rng.normal(size=60)
    found = mean_of("x", after).difference(mean_of("x", before), resamples=800, seed=5)
    expected = paired_bootstrap(after.tolist(), before.tolist(), resamples=800, seed=5)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(tuple(expected), abs=1e-9)
    assert found.high - found.low < 0.1 * (mean_of("x", after).figure().high - mean_of("x", after).figure().low)


def test_items_are_paired_by_their_keys() -> None:
    after = mean_of("x", [1.0, 5.0, 3.0], keys=["a", "b", "c"])
    before = mean_of("x", [2.0, 7.0, 9.0], keys=["c", "a", "d"])
    found = after.difference(before)
    assert found is not None
    assert found.n == 2
    assert found.value == pytest.approx((1.0 + 3.0) / 2 - (7.0 + 2.0) / 2)
    assert after.difference(mean_of("x", [1.0], keys=["z"])) is None


def test_an_undefined_ratio_is_nan_and_json_says_null() -> None:
    assert math.isnan(ratio(np.array([0.0, 0.0])))
    figure = Figure("word_perplexity", math.inf, 5.0, math.inf, 3)
    assert figure.as_json()["value"] is None
    assert figure.as_json()["high"] is None
    assert figure.as_json()["low"] == 5.0
