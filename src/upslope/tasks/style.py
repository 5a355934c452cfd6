"""How a reply is to sound or to look: a continuation of positive (or negative) tone, or strict JSON.

Continue a neutral opening so that it sounds positive (or negative), judged by the VADER lexicon.

A dense reward for free text: Hutto and Gilbert (2014), VADER, MIT. The classic first task of learning from a
reward on language models (1909.08593, section 3.1), with a lexicon in the place of a learned classifier.

Turn a sentence into strict JSON: short, checkable, and a habit small chat models do not have.

"Return a JSON object with keys name and age for: Anna is 31." -> {"name": "Anna", "age": 31}
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from upslope.data.readers import lines_of
from upslope.errors import ConfigError
from upslope.extras import require
from upslope.rewards.functions import json_object
from upslope.tasks.base import Split, Task, answered, chat_prompt, checked_fraction, derive_seed, shuffled
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
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def size(self, split: Split) -> int:
        """How many different openings the split has."""
        return self.count(self._all(), split)

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

    def _prompt(self, opening: str) -> Prompt:
        metadata = {"opening": opening}
        if not self.chat:
            return Prompt(key=0, text=opening, metadata=metadata)
        asked = f"Continue this text with one {self.target} sentence: {opening}"
        return Prompt(key=0, messages=(Message("user", asked),), metadata=metadata)


def built_in_openings() -> list[str]:
    """Every pairing of a subject and a turn that VADER finds exactly neutral words for: 300 openings."""
    return [f"{subject} {turn}" for subject in _SUBJECTS for turn in _TURNS]


_NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jack", "Karen", "Liam", "Maria",
    "Noah", "Olga", "Paul", "Quinn", "Rosa", "Simon", "Tina", "Uwe", "Vera", "Walter", "Xenia", "Yusuf", "Zoe",
    "Amir", "Bella", "Chen", "Diego", "Elena", "Fatima", "George", "Hana", "Ivan", "Julia", "Kofi", "Lena", "Marco",
    "Nina",
)  # fmt: skip
_SENTENCES = ("{name} is {age}.", "{name} is {age} years old.", "{name} turned {age}.", "The age of {name} is {age}.")
_OLDEST = 99
DEFAULT_ASK = "Return a JSON object with keys name and age for: {sentence}"


class StrictJson(Task):
    """A name and an age as one JSON object (RFC 8259) and nothing around it.

    ask: the request, with {sentence} where the sentence goes. system: a system turn, if any. Reward: the mean of three
    parts, each 0 or 1: `json` (the whole reply is one object with exactly the two keys), `name` and `age` (the right
    value of the right type in it). Correct: all three.
    """

    name = "strict_json"
    inline_safe = True

    def __init__(self, *, ask: str = DEFAULT_ASK, system: str = "", eval_fraction: float = 0.25) -> None:
        if "{sentence}" not in ask:
            raise ConfigError(f"'strict_json': ask must hold {{sentence}}, got {ask!r}")
        self.ask = ask
        self.system = system
        self.eval_fraction = checked_fraction(eval_fraction)

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different sentences of the 15,840 there are. DataError: more than the split has."""
        made = self._candidates(random.Random(derive_seed("strict_json", split, seed)))
        return self.select(made, split, n, identity=lambda prompt: prompt.metadata["sentence"], patience=20_000)

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """The mean of the parts; nothing is ever run, any text gets a judgement."""
        (strict,) = json_object([prompt], [text], keys="name|age", exact=True)
        found: dict[str, Any] = json.loads(text) if strict else {}
        age = found.get("age")
        parts = {
            "json": float(strict),
            "name": float(found.get("name") == prompt.metadata["name"]),
            # True == 1 and 31.0 == 31 in Python; the right type is part of the answer.
            "age": float(type(age) is int and age == prompt.metadata["age"]),
        }
        return Reward(sum(parts.values()) / 3, parts, correct=all(parts.values()))

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation with the right object as its reply."""
        return answered(prompt, str(prompt.answer))

    def _candidates(self, source: random.Random) -> Iterator[Prompt]:
        while True:
            name, age = source.choice(_NAMES), source.randint(1, _OLDEST)
            sentence = source.choice(_SENTENCES).format(name=name, age=age)
            yield chat_prompt(
                self.ask.replace("{sentence}", sentence),
                system=self.system,
                answer=json.dumps({"name": name, "age": age}),
                metadata={"sentence": sentence, "name": name, "age": age},
            )
