"""How different a set of texts is from itself. Pure Python; a word is what white space separates.

What reinforcement and imitation take away first is variety; these numbers show it before the quality does.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence

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
    counts: Counter[Gram] = Counter()
    for text in texts:
        counts.update(_grams(text.split(), n))
    return len(counts) / counts.total() if counts else 0.0


def unique_share(texts: Sequence[str]) -> float:
    """Different texts over all texts, in (0, 1], white space aside; 1 for no texts."""
    return len({" ".join(text.split()) for text in texts}) / len(texts) if texts else 1.0


def self_bleu(texts: Sequence[str], *, order: int = 4, sample: int | None = None, seed: int = 0) -> float:
    """Mean BLEU of each text against all the others, in [0, 1]: 1 is a set of equal texts (Zhu et al. 2018, Texygen).

    sample: use this many of the texts, drawn by `seed`, since the value depends on how many references there are.
    0 below two texts. ValueError: order or sample below 1.
    """
    if order < 1 or (sample is not None and sample < 1):
        raise ValueError(f"self_bleu: order and sample must be at least 1, got {order} and {sample}")
    if sample is not None and len(texts) > sample:
        texts = random.Random(seed).sample(list(texts), sample)
    if len(texts) < 2:
        return 0.0
    words = [text.split() for text in texts]
    tables = [_HighestCounts([Counter(_grams(w, n)) for w in words]) for n in range(1, order + 1)]
    lengths = Counter(map(len, words))
    scores = []
    for place, own in enumerate(words):
        matched = [table.clipped(place) for table in tables]
        totals = [max(0, len(own) - n) for n in range(order)]
        others = lengths - Counter([len(own)])
        scores.append(_score(matched, totals, len(own), others))
    return math.fsum(scores) / len(scores)


def bleu(text: str, references: Sequence[str], *, order: int = 4) -> float:
    """Sentence BLEU of one text against references, unsmoothed, over the n-gram orders the text has (2002, Papineni).

    Geometric mean of the clipped n-gram precisions for n = 1..min(order, words), times the brevity penalty against
    the reference of the nearest length (the shorter of two equally near). An order without a match gives 0; an empty
    text scores 1 beside an empty reference, else 0. ValueError: no references, or order below 1.
    """
    if not references or order < 1:
        raise ValueError(f"bleu: needs at least one reference and order >= 1, got {len(references)} and {order}")
    words, others = text.split(), [reference.split() for reference in references]
    matched, totals = [], []
    for n in range(1, order + 1):
        own = Counter(_grams(words, n))
        counted = [Counter(_grams(other, n)) for other in others]
        matched.append(sum(min(count, max(c[gram] for c in counted)) for gram, count in own.items()))
        totals.append(own.total())
    return _score(matched, totals, len(words), Counter(map(len, others)))


def _score(matched: Sequence[int], totals: Sequence[int], length: int, reference_lengths: Counter[int]) -> float:
    if length == 0:
        return float(0 in reference_lengths)
    pairs = [(m, t) for m, t in zip(matched, totals, strict=True) if t]
    if any(m == 0 for m, _ in pairs):
        return 0.0
    nearest = min(reference_lengths, key=lambda other: (abs(other - length), other))
    brevity = min(0.0, 1.0 - nearest / length)
    return math.exp(brevity + math.fsum(math.log(m / t) for m, t in pairs) / len(pairs))


def _grams(words: Sequence[str], n: int) -> list[Gram]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


class _HighestCounts:
    """For every n-gram its two highest counts in one text, so that "the highest elsewhere" is a look-up."""

    def __init__(self, counts: Sequence[Counter[Gram]]) -> None:
        self.counts = counts
        self.best: dict[Gram, tuple[int, int, int]] = {}  # highest, who has it, highest among the rest
        for place, own in enumerate(counts):
            for gram, count in own.items():
                first, owner, second = self.best.get(gram, (0, -1, 0))
                if count > first:
                    self.best[gram] = (count, place, first)
                elif count > second:
                    self.best[gram] = (first, owner, count)

    def clipped(self, place: int) -> int:
        """Matches of text `place` against all others, each n-gram at most as often as one other text has it."""
        total = 0
        for gram, count in self.counts[place].items():
            first, owner, second = self.best[gram]
            total += min(count, second if owner == place else first)
        return total
