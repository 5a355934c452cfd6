"""What a task's judge said of one or several samples per problem: accuracy, pass@k, mean reward."""

import math
from collections.abc import Iterable, Sequence
from typing import TypedDict

from upslope.errors import DataError
from upslope.evaluation.measurement import Measurement, mean_of, wilson
from upslope.types import Reward, RolloutGroup


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate from n samples that one of k is right (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    1 - C(n - c, k) / C(n, k), as the product 1 - prod_{i = n-c+1}^{n} (1 - k / i). ValueError: not 1 <= k <= n and
    0 <= correct <= n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= correct <= n, got k={k}, n={n}, correct={correct}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def verdicts(groups: Sequence[RolloutGroup], dataset: str) -> list[Measurement]:
    """The figures of judged groups, over problems: accuracy of one sample each, or pass@k for k = 1, 2, 4, ... and all.

    Without verdicts only `reward`, the mean over problems of the mean over their samples. What could not be judged is
    neither right nor wrong: it is left out, counted in detail["errors"], and a problem with fewer than k judged
    samples has no pass@k. detail["cut"]: of its "completions", those that ended at the length limit. DataError: nothing
    was judged, or only some rewards carry a verdict.
    """
    judged = [[r.reward for r in group.rollouts if r.reward.value is not None] for group in groups]
    rewards = [reward for group in judged for reward in group]
    failed = [r.reward.error for group in groups for r in group.rollouts if r.reward.value is None]
    if not rewards:
        raise DataError(f"{dataset}: no completion was judged; the first error: {failed[0] if failed else 'none'}")
    known = sum(reward.correct is not None for reward in rewards)
    if 0 < known < len(rewards):
        raise DataError(
            f"{dataset}: the judge gave a verdict on {known} of {len(rewards)} completions; give all or none"
        )
    reasons = [r.finish_reason for group in groups for r in group.rollouts]
    samples = max(len(g.rollouts) for g in groups)
    detail = {"samples": samples, "errors": len(failed)}
    detail |= {"cut": reasons.count("length"), "completions": len(reasons)}
    if failed:
        detail["first_error"] = failed[0] or "not judged"
    fields = {"dataset": dataset, "unit": "problems", "detail": detail}
    keys = [group.prompt.key for group in groups]
    some = [(key, group) for key, group in zip(keys, judged, strict=True) if group]
    means = [math.fsum(r.value for r in group if r.value is not None) / len(group) for _, group in some]
    reward = mean_of("reward", means, keys=[key for key, _ in some], **fields)
    counts = [(key, len(group), sum(bool(r.correct) for r in group)) for key, group in some if known]
    found = []
    for k in [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]:
        if values := [(key, pass_at_k(n, correct, k)) for key, n, correct in counts if n >= k]:
            keys, shares = zip(*values, strict=True)
            name = "accuracy" if samples == 1 else f"pass@{k}"
            found.append(mean_of(name, shares, keys=list(keys), **fields))
    return [*found, reward]


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
    judged = [(reward.value, reward.correct) for reward in given if reward.value is not None]
    if not judged:
        detail = f"; the first error: {given[0].error or 'not judged'}" if given else ""
        raise DataError(f"no completion was judged, so there is no accuracy{detail}")
    if threshold is None and any(correct is None for _, correct in judged):
        raise DataError("the rewards carry no verdicts; return Reward(value, correct=...) or pass a threshold")
    right = sum(bool(correct) if threshold is None else value >= threshold for value, correct in judged)
    value, low, high = wilson(right, len(judged))
    return Accuracy(value=value, low=low, high=high, n=len(judged), errors=len(given) - len(judged))


def evaluate(groups: Sequence[RolloutGroup], *, threshold: float | None = None) -> Accuracy:
    """`accuracy` of judged groups of one rollout each (greedy evaluation). DataError: a group has more or none."""
    wrong = next((group for group in groups if len(group.rollouts) != 1), None)
    if wrong is not None:
        raise DataError(
            f"accuracy needs one completion per problem, prompt {wrong.prompt.key} has {len(wrong.rollouts)}; "
            f"use pass@k for several"
        )
    return accuracy((group.rollouts[0].reward for group in groups), threshold=threshold)
