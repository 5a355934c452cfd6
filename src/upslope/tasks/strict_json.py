"""Turn a sentence into strict JSON: short, checkable, and a habit small chat models do not have.

"Return a JSON object with keys name and age for: Anna is 31." -> {"name": "Anna", "age": 31}
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from upslope.errors import ConfigError
from upslope.rewards.functions import json_object
from upslope.tasks.base import Split, Task, answered, chat_prompt, checked_fraction, derive_seed
from upslope.types import Message, Prompt, Reward

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
