"""Confidence intervals: hand constants, coverage, and randomness that is a function of the seed."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.evaluation.measurement import bootstrap_mean, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    value, lower, upper = wilson(successes, n)
    assert value == successes / n
    assert (lower, upper) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000), st.data(), st.floats(0.5, 0.999))
def test_wilson_limits_solve_the_score_equation(n: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, n))
    value, low, high = wilson(successes, n, confidence)
    assert 0 <= low <= value <= high <= 1
    _, *wider = wilson(successes, n, (1 + confidence) / 2)
    assert wider[0] <= low
    assert wider[1] >= high
    mirrored = wilson(n - successes, n, confidence)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    # a limit p is where |value - p| = z sqrt(p (1 - p) / n); two limits give the same z
    z = [abs(value - p) / math.sqrt(p * (1 - p) / n) for p in (low, high) if 0 < p < 1]
    if len(z) == 2:
        assert z[0] == pytest.approx(z[1], rel=1e-6)


def test_wilson_covers_as_often_as_it_says() -> None:
    """Exact coverage at n = 500 by summing the binomial, not by simulation."""
    for p in (0.05, 0.37, 0.9):
        covered = 0.0
        for k in range(501):
            log_weight = math.lgamma(501) - math.lgamma(k + 1) - math.lgamma(501 - k)
            weight = math.exp(log_weight + k * math.log(p) + (500 - k) * math.log1p(-p))
            _, low, high = wilson(k, 500)
            covered += weight * (low <= p <= high)
        assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("successes", "n", "c"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 0)])
def test_wilson_refuses(successes: int, n: int, c: float) -> None:
    with pytest.raises(ValueError, match=r"successes|confidence"):
        wilson(successes, n, c)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    value, low, high = bootstrap_mean(x.tolist())
    half = 1.96 * x.std() / 20
    assert value == pytest.approx(x.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)


def test_bootstrap_draws_are_uniform_and_independent_of_chunks() -> None:
    from upslope.evaluation.measurement import _draws

    draws = _draws(np.arange(2000, dtype=np.uint64), 50, seed=1)
    counts = np.bincount(draws.ravel(), minlength=50)
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert 20 < chi2 < 95  # 49 degrees of freedom: 1e-4 on either side
    assert np.array_equal(draws[700:710], _draws(np.arange(700, 710, dtype=np.uint64), 50, seed=1))
    assert not np.array_equal(draws, _draws(np.arange(2000, dtype=np.uint64), 50, seed=2))


def test_pairing_narrows_the_interval_and_constants_have_none() -> None:
    rng = np.random.default_rng(1)
    difficulty = rng.random(300)
    before = (difficulty < 0.5).astype(float)
    after = (difficulty < 0.6).astype(float)
    value, low, high = paired_bootstrap(after.tolist(), before.tolist())
    assert value == pytest.approx((after - before).mean())
    assert 0 < low < value < high
    separate = sum(i.high - i.low for i in (bootstrap_mean(after.tolist()), bootstrap_mean(before.tolist())))
    assert high - low < separate / 2
    assert paired_bootstrap([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0)


def test_the_seed_decides() -> None:
    x = np.random.default_rng(2).random(60).tolist()
    assert bootstrap_mean(x, seed=5, resamples=500) == bootstrap_mean(x, seed=5, resamples=500)
    assert bootstrap_mean(x, seed=5, resamples=500) != bootstrap_mean(x, seed=6, resamples=500)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [[1.0]]])
def test_bootstrap_refuses(bad) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_mean(bad)


def test_bootstrap_refuses_options() -> None:
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean([1.0], resamples=0)


def test_no_torch_is_imported() -> None:
    code = "import sys, upslope.evaluation.measurement; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
