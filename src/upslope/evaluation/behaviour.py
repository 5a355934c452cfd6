"""What a policy's replies tell besides being right: how sure it is of them, and how different they are from each other.

What reinforcement and imitation take away first is variety; the numbers of diversity show it before the quality does.
They are pure Python, and a word is what white space separates.
"""

import math
import random
from collections import Counter, defaultdict
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


Gram = tuple[str, ...]


def diversity(texts: Sequence[str], *, sample: int = 64, seed: int = 0) -> dict[str, float]:
    """distinct_1, distinct_2, unique_share and self_bleu of the texts; self_bleu over `sample` of them at most."""
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "unique_share": unique_share(texts),
        "self_bleu": self_bleu(texts, sample=sample, seed=seed),
    }


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of the set, in [0, 1]; 0 where no text has n words.

    Source: Li et al. 2016 (arXiv 1510.03055). It falls with the number of texts: compare sets of one size only.
    ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"distinct_n: n must be at least 1, got {n}")
    counts = Counter(gram for text in texts for gram in _grams(text.split(), n))
    return len(counts) / counts.total() if counts else 0.0


def unique_share(texts: Sequence[str]) -> float:
    """Different texts over all texts, in (0, 1], white space aside; 1 for no texts."""
    return len({" ".join(text.split()) for text in texts}) / len(texts) if texts else 1.0


def self_bleu(texts: Sequence[str], *, order: int = 4, sample: int | None = None, seed: int = 0) -> float:
    """Mean BLEU of each text against all the others, in [0, 1]: 1 is a set of equal texts (Zhu et al. 2018, Texygen).

    BLEU (Papineni et al. 2002) is unsmoothed, over the n-gram orders that the text has. sample: use this many of the
    texts, drawn by `seed`, since the value depends on how many references there are. 0 below two texts. ValueError:
    order or sample below 1.
    """
    if order < 1 or (sample is not None and sample < 1):
        raise ValueError(f"self_bleu: order and sample must be at least 1, got {order} and {sample}")
    if sample is not None and len(texts) > sample:
        texts = random.Random(seed).sample(list(texts), sample)
    if len(texts) < 2:
        return 0.0
    words = [text.split() for text in texts]
    matched = zip(*(_matches([Counter(_grams(own, n)) for own in words]) for n in range(1, order + 1)), strict=True)
    lengths = Counter(map(len, words))
    scores = [_score(found, len(own), lengths - Counter([len(own)])) for own, found in zip(words, matched, strict=True)]
    return math.fsum(scores) / len(scores)


def _score(matched: Sequence[int], length: int, reference_lengths: Counter[int]) -> float:
    """BLEU of a text from the matches of its n-grams, n = 1, 2, ...; the nearest length counts, of two the shorter."""
    if length == 0:
        return float(0 in reference_lengths)
    shares = [found / (length - n) for n, found in enumerate(matched) if length > n]
    if not all(shares):
        return 0.0
    nearest = min(reference_lengths, key=lambda other: (abs(other - length), other))
    return math.exp(min(0.0, 1.0 - nearest / length) + math.fsum(map(math.log, shares)) / len(shares))


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _matches(counts: Sequence[Counter[Gram]]) -> list[int]:
    """Matches of each text against all others, each n-gram at most as often as one other text has it."""
    highest: dict[Gram, list[int]] = defaultdict(lambda: [0, 0])
    for own in counts:
        for gram, count in own.items():
            highest[gram] = sorted([*highest[gram], count])[1:]
    # who has the highest count sees the second highest elsewhere
    return [sum(min(count, highest[gram][count < highest[gram][1]]) for gram, count in own.items()) for own in counts]
