"""Which tokens the masked objective hides, and what it puts in their place (Devlin et al. 2019, arXiv 1810.04805).

Of the chosen tokens 80% become [MASK], 10% another token, 10% stay: the network cannot know which ones it is asked
for. The choice is a pure function of (seed, counter), by raw outputs of a Philox generator, which numpy keeps
unchanged between versions.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Masking:
    """probability: share of the tokens chosen. words: the ids that may stand in for a token. keep: never chosen."""

    probability: float
    mask_id: int
    words: Sequence[int]
    keep: Container[int]
    seed: int

    def apply(self, tokens: Sequence[int], counter: int) -> tuple[list[int], list[int]]:
        """The tokens with some replaced, and the places chosen, ascending; at least one where any may be."""
        raw = np.random.Philox(key=np.array([self.seed & _WORD, counter & _WORD], dtype=np.uint64)).random_raw(
            3 * len(tokens)
        )
        choose, how = (raw[: 2 * len(tokens)] >> np.uint64(11)).reshape(2, -1) * 2.0**-53
        free = [t for t, token in enumerate(tokens) if token not in self.keep]
        places = [t for t in free if choose[t] < self.probability]
        if free and not places:
            places = [min(free, key=lambda t: choose[t])]
        changed = list(tokens)
        for t in places:
            if how[t] < 0.8:
                changed[t] = self.mask_id
            elif how[t] < 0.9:
                changed[t] = self.words[int(raw[2 * len(tokens) + t]) % len(self.words)]
        return changed, places
