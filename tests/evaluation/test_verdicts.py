"""pass@k against the definition by enumeration, and judged groups to figures."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest

from upslope.errors import DataError
from upslope.evaluation.measurement import wilson
from upslope.evaluation.verdicts import pass_at_k, verdicts
from upslope.types import Prompt, Reward, Rollout, RolloutGroup


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets(n: int) -> None:
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(200, 13, 100) == pytest.approx(1 - comb(187, 100) / comb(200, 100), rel=1e-12)
    assert pass_at_k(200, 0, 100) == 0.0
    assert pass_at_k(200, 101, 100) == 1.0


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_refuses(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}, n={n}, correct={correct}"):
        pass_at_k(n, correct, k)


def group(key: int, *marks: float | None, known: bool = True) -> RolloutGroup:
    rollouts = [
        Rollout([1], [2], [True], [0.0], [0.0], "stop", "", i, reward=_reward(mark, known))
        for i, mark in enumerate(marks)
    ]
    return RolloutGroup(Prompt(key, text="x"), rollouts)


def _reward(mark: float | None, known: bool) -> Reward:
    if mark is None:
        return Reward(None, error="timed out")
    return Reward(mark, correct=mark == 1.0 if known else None)


def test_one_sample_gives_accuracy() -> None:
    groups = [group(i, float(i < 3)) for i in range(10)]
    accuracy, reward = (m.figure() for m in verdicts(groups, "t"))
    assert (accuracy.name, accuracy.value, accuracy.low, accuracy.high) == ("accuracy", *wilson(3, 10))
    assert (reward.name, reward.value, reward.n) == ("reward", pytest.approx(0.3), 10)


def test_several_samples_give_pass_at_powers_of_two() -> None:
    groups = [group(1, 1, 0, 0, 0, 0, 0), group(2, 0, 0, 0, 0, 0, 0), group(3, 1, 1, 1, 1, 1, 1)]
    found = {m.name: m.figure(resamples=50) for m in verdicts(groups, "t")}
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6", "reward"]
    assert found["pass@1"].value == pytest.approx((1 / 6 + 0 + 1) / 3)
    assert found["pass@4"].value == pytest.approx((4 / 6 + 0 + 1) / 3)
    assert found["pass@6"].value == pytest.approx(2 / 3)
    assert found["pass@6"].n == 3


def test_what_could_not_be_judged_is_left_out_and_counted() -> None:
    groups = [group(1, 1, None, 0), group(2, None, None, None), group(3, 0, 0, 0)]
    found = {m.name: m for m in verdicts(groups, "t")}
    assert found["pass@1"].keys == [1, 3]
    assert found["pass@3"].keys == [3]
    assert found["pass@1"].figure(resamples=10).detail["errors"] == 4
    assert found["pass@1"].figure(resamples=10).value == pytest.approx(0.25)


def test_without_verdicts_there_is_the_reward_only() -> None:
    (only,) = verdicts([group(1, 0.25, known=False), group(2, 0.75, known=False)], "t")
    assert (only.name, only.figure(resamples=10).value) == ("reward", 0.5)


def test_refusals() -> None:
    with pytest.raises(DataError, match="t: no completion was judged; the first error: timed out"):
        verdicts([group(1, None)], "t")
    with pytest.raises(DataError, match="a verdict on 1 of 2"):
        verdicts([group(1, 1.0), group(2, 1.0, known=False)], "t")
