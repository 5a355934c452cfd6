"""Continue a neutral opening so that it sounds positive (or negative), judged by the VADER lexicon.

A dense reward for free text: Hutto and Gilbert (2014), VADER, MIT. The classic first task of learning from a
reward on language models (1909.08593, section 3.1), with a lexicon in the place of a learned classifier.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from upslope.data.readers import lines_of
from upslope.errors import ConfigError
from upslope.extras import require
from upslope.tasks.base import Split, Task, checked_fraction, content_key, shuffled, split_of
from upslope.types import Message, Prompt, Reward

THRESHOLD = 0.05
MAX_CHARACTERS = 8000

_SUBJECTS = (
    "My neighbour", "The new teacher", "Our guide", "The bus driver", "The man next door", "The museum", "This book",
    "The second chapter", "The restaurant by the station", "Her letter", "The meeting", "The film we saw", "The hotel",
    "Their garden", "The evening train", "The phone I bought", "The class", "Our trip", "The concert", "This recipe",
)  # fmt: skip
_TURNS = (
    "was, on the whole,", "turned out to be", "seemed to everyone", "left us thinking it was", "was described as",
    "has always been", "reminded me of something", "looked, at first,", "made the whole week", "became, by the end,",
    "sounded to me", "was said to be", "started out", "ended up", "had something",
)  # fmt: skip


class Sentiment(Task):
    """Continuations of neutral openings, rewarded by VADER's compound score in [-1, 1].

    target: the wanted sentiment. openings: a text file with one opening per line, in the place of the 300 built in.
    chat: ask for the continuation in a user turn; otherwise the model continues the bare text. Correct means beyond
    VADER's own threshold of 0.05. Only the continuation is scored.
    """

    name = "sentiment"
    inline_safe = True

    def __init__(
        self, *, target: str = "positive", openings: str = "", chat: bool = False, eval_fraction: float = 0.25
    ) -> None:
        if target not in ("positive", "negative"):
            raise ConfigError(f"'sentiment': target must be 'positive' or 'negative', not '{target}'")
        self.target: Literal["positive", "negative"] = target  # pyright: ignore[reportAttributeAccessIssue]
        self.openings, self.divided = openings, bool(openings)
        self.chat, self.open_ended = chat, not chat
        self.eval_fraction = checked_fraction(eval_fraction)
        require("tasks", "vaderSentiment")

    def size(self, split: Split) -> int:
        """How many different openings the split has."""
        keys = {content_key(opening) for opening in self._all()}
        return sum(split_of(key, self.eval_fraction) == split for key in keys)

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different openings, in an order given by `seed`. DataError: there are fewer."""
        made = [self._prompt(opening) for opening in shuffled(self._all(), "sentiment", split, seed)]
        identity = lambda prompt: prompt.metadata["opening"]  # noqa: E731
        return self.select(made, split, n, identity=identity, patience=len(made) + 1)

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """The compound score, its sign turned for the target 'negative'."""
        compound = float(self._analyzer.polarity_scores(text[:MAX_CHARACTERS])["compound"])
        score = compound if self.target == "positive" else -compound
        return Reward(value=score, correct=score >= THRESHOLD)

    def _all(self) -> list[str]:
        if not self.openings:
            return built_in_openings()
        return [line.strip() for _, line in lines_of(Path(self.openings).expanduser())]

    @cached_property
    def _analyzer(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        return SentimentIntensityAnalyzer()

    def _prompt(self, opening: str) -> Prompt:
        metadata = {"opening": opening}
        if not self.chat:
            return Prompt(key=0, text=opening, metadata=metadata)
        asked = f"Continue this text with one {self.target} sentence: {opening}"
        return Prompt(key=0, messages=(Message("user", asked),), metadata=metadata)


def built_in_openings() -> list[str]:
    """Every pairing of a subject and a turn that VADER finds exactly neutral words for: 300 openings."""
    return [f"{subject} {turn}" for subject in _SUBJECTS for turn in _TURNS]
