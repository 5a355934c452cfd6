"""Accuracy of judged completions with its 95% interval, in the form that summaries store."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from upslope.errors import DataError
from upslope.evaluation.intervals import wilson
from upslope.types import Reward, RolloutGroup


class Accuracy(TypedDict):
    """value, and its Wilson 95% interval low to high, over n judged problems; errors could not be judged."""

    value: float
    low: float
    high: float
    n: int
    errors: int


def accuracy(rewards: Iterable[Reward], *, threshold: float | None = None) -> Accuracy:
    """Share of correct completions among those judged, one per problem.

    Correct is the task's verdict, or with `threshold` value >= threshold. Completions whose judging failed are left
    out of n and counted in `errors`: they are neither right nor wrong, so look at that number before the value.
    Interval: Wilson (1927), which assumes independent problems; so never pass several samples of one problem.

    Raises DataError: nothing was judged, or a reward carries no verdict and no threshold is given.
    """
    given = list(rewards)
    errors = [reward.error or "not judged" for reward in given if reward.value is None]
    verdicts = [_verdict(reward, reward.value, threshold) for reward in given if reward.value is not None]
    if not verdicts:
        detail = f"; the first error: {errors[0]}" if errors else ""
        raise DataError(f"no completion was judged, so there is no accuracy{detail}")
    value, low, high = wilson(sum(verdicts), len(verdicts))
    return Accuracy(value=value, low=low, high=high, n=len(verdicts), errors=len(errors))


def _verdict(reward: Reward, value: float, threshold: float | None) -> bool:
    if threshold is not None:
        return value >= threshold
    if reward.correct is None:
        raise DataError("the rewards carry no verdicts; return Reward(value, correct=...) or pass a threshold")
    return reward.correct


def evaluate(groups: Sequence[RolloutGroup], *, threshold: float | None = None) -> Accuracy:
    """`accuracy` of judged groups of one rollout each (greedy evaluation). DataError: a group has more or none."""
    wrong = next((group for group in groups if len(group.rollouts) != 1), None)
    if wrong is not None:
        raise DataError(
            f"accuracy needs one completion per problem, prompt {wrong.prompt.key} has {len(wrong.rollouts)}; "
            f"use pass@k for several"
        )
    return accuracy((group.rollouts[0].reward for group in groups), threshold=threshold)
