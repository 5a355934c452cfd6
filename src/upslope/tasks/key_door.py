"""Credit behind noise: a choice in the middle of the way pays only at its end, and what came before it is a lottery.

After Hung et al. (2019, arXiv 1810.06721), who measure how well an agent assigns credit to a key that opens a door
much later, with distracting apples on the way. Here a letter is a step:

    a or b, c or d, ... w or x    y or z      A or B, C or D, E or F
    `-------- apples --------'    key         corridor

Every step has two letters of its own, so that the last letter tells where one stands. At each of the first steps either
letter is an apple worth +noise or -noise; then the second letter ("z" above) takes the key; at the end of the corridor
the door pays `door` if it was taken.

An apple's worth is a coin toss that depends on the room (the prompt), the step and the letter: known to the judge,
the same whenever the same letter is picked there, zero on average, and in no relation to the key. Over many rooms there
is nothing in it to learn, but it drowns the door in the total: apples bring `steps` times noise squared of variance.
A learner that knows when rewards came is not fooled: what was earned before the key is not in its return to go, and a
critic carries the door's pay back through the silent corridor.

Rewards carry their steps (`Reward.steps`), one token per letter; a learner that looks at the total sees the sum.
"""

import hashlib
import random
from collections.abc import Sequence

from upslope.errors import ConfigError
from upslope.tasks.base import Split, Task, answered, checked_fraction, derive_seed
from upslope.types import Message, Prompt, Reward

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"


class KeyDoor(Task):
    """Rooms with apples, a key, a corridor and a door.

    steps: apples before the key; corridor: letters between key and door; door: what the door pays; noise: size of an
    apple's worth; room: digits of the prompt. A completion that stops, or takes a letter of another step, within its
    steps + 1 + corridor letters does not reach the door; what follows them is not read. `correct` says that the door
    was opened.
    """

    name = "key_door"
    inline_safe = True
    open_ended = True

    def __init__(
        self,
        *,
        steps: int = 12,
        corridor: int = 3,
        door: float = 1.0,
        noise: float = 3.0,
        room: int = 6,
        eval_fraction: float = 0.2,
    ) -> None:
        most = len(ALPHABET) // 2
        if min(steps, room) < 1 or corridor < 0 or steps + 1 + corridor > most:
            raise ConfigError(
                f"'key_door': steps and room must be at least 1, corridor at least 0 and steps + 1 + corridor at most "
                f"{most}, got {steps}, {room} and {corridor}"
            )
        if not (door > 0 and noise >= 0):
            raise ConfigError(f"'key_door': door must be positive and noise not negative, got {door} and {noise}")
        self.steps, self.corridor, self.door, self.noise = steps, corridor, door, noise
        self.room, self.eval_fraction = room, checked_fraction(eval_fraction)

    @property
    def length(self) -> int:
        """Letters of a whole way."""
        return self.steps + 1 + self.corridor

    def prompts(self, split: Split, n: int, *, seed: int) -> list[Prompt]:
        """`n` different rooms, each a few digits. DataError: there are fewer."""
        draw = random.Random(derive_seed("key_door", split, seed))
        rooms = (Prompt(key=0, text="".join(draw.choices(DIGITS, k=self.room))) for _ in iter(int, 1))
        return self.select(rooms, split, n)

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """A way with letters drawn at random, the key taken half the time: the form, not the solution."""
        assert prompt.text is not None
        draw = random.Random(derive_seed("key_door walk", prompt.text))
        return answered(prompt, self.way([draw.random() < 0.5 for _ in range(self.length)]))

    def way(self, choices: Sequence[bool]) -> str:
        """The letters of a choice at each step: False is a step's first letter, True its second."""
        return "".join(ALPHABET[2 * step + choice] for step, choice in enumerate(choices))

    def worth(self, room: str, step: int, letter: str) -> float:
        """What a letter earns as the apple of a step."""
        digest = hashlib.blake2b(f"{room}\x1f{step}\x1f{letter}".encode(), digest_size=1).digest()
        return self.noise if digest[0] & 1 else -self.noise

    def judge(self, prompt: Prompt, text: str) -> Reward:
        """The apples of the way and the door's pay, at the letters that earned them."""
        assert prompt.text is not None
        way = "".join(text.split())[: self.length]
        sound = next((i for i, x in enumerate(way) if x not in ALPHABET[2 * i : 2 * i + 2]), len(way))
        apples = [(i, self.worth(prompt.text, i, way[i])) for i in range(min(sound, self.steps))]
        opened = sound == self.length and way[self.steps] == ALPHABET[2 * self.steps + 1]
        pay = self.door if opened else 0.0
        collected = sum(value for _, value in apples)
        return Reward(
            value=collected + pay,
            parts={"apples": collected, "door": pay},
            correct=opened,
            steps=[*apples, *([(self.length - 1, pay)] if opened else [])],
        )
