"""What a task's judge said of one or several samples per problem: accuracy, pass@k, mean reward."""

import math
from collections.abc import Sequence

from upslope.errors import DataError
from upslope.evaluation.measurement import Measurement, mean_of
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
    detail = {"samples": max(len(g.rollouts) for g in groups), "errors": len(failed)}
    detail |= {"cut": reasons.count("length"), "completions": len(reasons)}
    if failed:
        detail["first_error"] = failed[0] or "not judged"
    fields = {"dataset": dataset, "unit": "problems", "detail": detail}
    keys = [group.prompt.key for group in groups]
    some = [(key, group) for key, group in zip(keys, judged, strict=True) if group]
    means = [math.fsum(r.value for r in group if r.value is not None) / len(group) for _, group in some]
    found = [mean_of("reward", means, keys=[key for key, _ in some], **fields)]
    return [*_right(some, max(len(g.rollouts) for g in groups), fields), *found] if known else found


def _right(some: Sequence[tuple[int, list[Reward]]], samples: int, fields: dict) -> list[Measurement]:
    counts = [(key, len(group), sum(bool(r.correct) for r in group)) for key, group in some]
    if samples == 1:
        return [mean_of("accuracy", [float(c) for _, _, c in counts], keys=[key for key, _, _ in counts], **fields)]
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    found = []
    for k in [*powers, samples]:
        values = {key: pass_at_k(n, c, k) for key, n, c in counts if n >= k}
        if values:
            found.append(mean_of(f"pass@{k}", list(values.values()), keys=list(values), **fields))
    return found
