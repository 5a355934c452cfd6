"""Accuracy of judged groups: counts by hand, errors apart, and an interval around it."""

from __future__ import annotations

import pytest

from upslope.errors import DataError
from upslope.evaluation.verdicts import accuracy, evaluate
from upslope.types import Prompt, Reward, Rollout, RolloutGroup


def groups_of(rewards: list[Reward]) -> list[RolloutGroup]:
    return [
        RolloutGroup(Prompt(i, text="q"), [Rollout([1], [1], [True], [0.0], [0.0], "stop", "t", 0, reward=reward)])
        for i, reward in enumerate(rewards)
    ]


def test_counts_and_interval() -> None:
    pytest.importorskip("upslope.evaluation.measurement")
    rewards = [Reward(1.0, correct=True)] * 30 + [Reward(0.0, correct=False)] * 10 + [Reward(None, error="x")] * 2
    got = evaluate(groups_of(rewards))
    assert (got["value"], got["n"], got["errors"]) == (0.75, 40, 2)
    # Wilson by hand: centre (30 + z^2/2) / (40 + z^2), half width z / (40 + z^2) * sqrt(30*10/40 + z^2/4)
    assert got["low"] == pytest.approx(0.59805, abs=1e-4)
    assert got["high"] == pytest.approx(0.85814, abs=1e-4)


def test_a_threshold_makes_verdicts() -> None:
    pytest.importorskip("upslope.evaluation.measurement")
    got = accuracy([Reward(0.5), Reward(0.49), Reward(1.0, correct=False)], threshold=0.5)
    assert got["value"] == pytest.approx(2 / 3)


def test_no_verdict_and_nothing_judged_are_errors() -> None:
    pytest.importorskip("upslope.evaluation.measurement")
    with pytest.raises(DataError, match="no verdicts"):
        accuracy([Reward(0.5)])
    with pytest.raises(DataError, match=r"no completion was judged.*boom"):
        accuracy([Reward(None, error="boom")])


def test_several_samples_of_one_problem_are_refused() -> None:
    (one,) = groups_of([Reward(1.0, correct=True)])
    one.rollouts.append(one.rollouts[0])
    with pytest.raises(DataError, match="one completion per problem"):
        evaluate([one])
