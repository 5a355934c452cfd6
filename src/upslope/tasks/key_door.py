"""Credit over a long delay: an early choice pays only at the end, behind many steps whose rewards are noise.

After Hung et al. (2019, arXiv 1810.06721), who measure how well an agent assigns credit to a key that opens a door
much later, with distracting apples in between. Here a letter is a step:

    k c d a k b ... d       the first letter takes the key ("k") or does not;
    | `---- apples ---´     each further letter is an apple worth +noise or -noise;
    key                     after the last of them the door pays `door` if the key was taken.

An apple's worth is a coin toss that depends on the room (the prompt), the step and the letter: known to the judge,
the same whenever the same letter is picked there, zero on average, and in no relation to the key. Over many rooms there
is nothing in it to learn. It drowns the door in the total reward, of which apples are `steps` times the noise squared
in variance. A critic that sees the letters is not fooled: what comes after a step is predicted by V, and what came
before it is not in the return to go.

Rewards carry their steps (`Reward.steps`), one token per letter; a learner that looks at the total sees the sum.
"""

from __future__ import annotations

import hashlib
import random

from upslope.errors import ConfigError
from upslope.tasks.base import Split, Task, check_split, derive_seed, select_prompts
from upslope.types import Message, Prompt, Reward

KEY = "k"
LETTERS = "abcd" + KEY


class KeyDoor(Task):
    """Rooms with a key at the entrance and a door at the end.

    steps: apples between key and door; door: what the door pays; noise: size of an apple's worth; room: letters of the
    prompt. A completion that stops before 1 + steps letters of abcdk does not reach the door; what follows them is
    not read. `correct` says that the door was opened.
    """

    name = "key_door"
    inline_safe = True

    def __init__(
        self, *, steps: int = 12, door: float = 2.0, noise: float = 2.0, room: int = 6, eval_fraction: float = 0.2
    ) -> None:
        if steps < 1 or room < 1:
            raise ConfigError(f"'key_door': steps and room must be at least 1, got {steps} and {room}")
        if not (door > 0 and noise >= 0):
            raise ConfigError(f"'key_door': door must be positive and noise not negative, got {door} and {noise}")
        check_split("train", 0, eval_fraction)
        self.steps, self.door, self.noise, self.room, self.eval_fraction = steps, door, noise, room, eval_fraction

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different rooms, each a few letters. DataError: there are fewer."""
        draw = random.Random(derive_seed("key_door", split, seed))
        rooms = (Prompt(key=0, text="".join(draw.choices(LETTERS, k=self.room))) for _ in iter(int, 1))
        return select_prompts(rooms, split, n, name=self.name, eval_fraction=self.eval_fraction)

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[Reward]:
        """The apples of the way and the door's pay, at the letters that earned them."""
        return [self._judge(prompt, "".join(text.split())) for prompt, text in zip(prompts, completions, strict=True)]

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """A walk through the room with letters drawn at random, the key as likely as any: the form, not the solution."""
        assert prompt.text is not None
        draw = random.Random(derive_seed("key_door walk", prompt.text))
        return (Message("user", prompt.text), Message("assistant", "".join(draw.choices(LETTERS, k=1 + self.steps))))

    def worth(self, room: str, step: int, letter: str) -> float:
        """What a letter earns as the apple of a step."""
        digest = hashlib.blake2b(f"{room}\x1f{step}\x1f{letter}".encode(), digest_size=1).digest()
        return self.noise if digest[0] & 1 else -self.noise

    def _judge(self, prompt: Prompt, walk: str) -> Reward:
        assert prompt.text is not None
        apples = [
            (i, self.worth(prompt.text, i, letter))
            for i, letter in enumerate(walk[1 : 1 + self.steps], start=1)
            if letter in LETTERS
        ]
        way = walk[: 1 + self.steps]
        opened = way[:1] == KEY and len(way) == 1 + self.steps and set(way) <= set(LETTERS)
        pay = self.door if opened else 0.0
        collected = sum(value for _, value in apples)
        return Reward(
            value=collected + pay,
            parts={"apples": collected, "door": pay},
            correct=opened,
            steps=[*apples, *([(self.steps, pay)] if opened else [])],
        )
