"""What a policy's replies tell besides being right: how sure it is of them, and how far it has moved."""

import math
from collections.abc import Sequence
from typing import TypedDict


class Bin(TypedDict):
    """Replies of like confidence: how many, their mean confidence and their share of right ones."""

    count: int
    confidence: float
    accuracy: float


class Calibration(TypedDict):
    """Expected calibration error, Brier score, and the bins of the reliability diagram that are not empty."""

    ece: float
    brier: float
    n: int
    bins: list[Bin]


def calibration(confidences: Sequence[float], correct: Sequence[bool], *, bins: int = 10) -> Calibration:
    """Does a confidence of p mean right with probability p?

    confidences: in [0, 1], such as the probability the policy gives its own reply. ece = sum over equal-width bins of
    (count / n) |accuracy - confidence| (Guo et al. 2017, arXiv 1706.04599, eq. 3); brier = mean (confidence -
    correct)^2 (Brier 1950). ValueError: lengths differ, nothing given, a confidence outside [0, 1].
    """
    n = len(confidences)
    if n == 0 or n != len(correct) or bins < 1:
        raise ValueError(f"need as many confidences as verdicts, at least one: got {n}, {len(correct)}, {bins} bins")
    if not all(0.0 <= c <= 1.0 for c in confidences):
        raise ValueError("confidences must lie in [0, 1]")
    members: list[list[int]] = [[] for _ in range(bins)]
    for i, confidence in enumerate(confidences):
        members[min(bins - 1, int(confidence * bins))].append(i)
    made = [
        Bin(
            count=len(group),
            confidence=math.fsum(confidences[i] for i in group) / len(group),
            accuracy=sum(bool(correct[i]) for i in group) / len(group),
        )
        for group in members
        if group
    ]
    ece = math.fsum(b["count"] / n * abs(b["accuracy"] - b["confidence"]) for b in made)
    brier = math.fsum((c - bool(y)) ** 2 for c, y in zip(confidences, correct, strict=True)) / n
    return Calibration(ece=ece, brier=brier, n=n, bins=made)
