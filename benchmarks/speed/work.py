"""The work of the comparison with peers: prompts and a reward in plain Python, for every worker's process."""

from __future__ import annotations

import random

HEROES = (
    "fisherman", "baker", "painter", "sailor", "farmer", "teacher", "doctor", "soldier", "singer", "hunter",
    "miller", "tailor", "shepherd", "carpenter", "gardener", "writer",
)  # fmt: skip
PLACES = (
    "village", "desert", "forest", "city", "harbor", "valley", "castle", "island", "prairie", "swamp", "canyon",
    "monastery", "market", "lighthouse", "mine", "inn",
)  # fmt: skip
FINDS = (
    "letter", "key", "map", "coin", "book", "sword", "ring", "lamp", "mirror", "bell", "box", "stone", "flute",
    "clock", "crown", "boat",
)  # fmt: skip


def prompts(count: int) -> list[str]:
    """The first `count` of 4096 different beginnings of a story, shuffled once: some 24 tokens each."""
    every = [(hero, place, find) for hero in HEROES for place in PLACES for find in FINDS]
    random.Random(0).shuffle(every)
    if count > len(every):
        raise ValueError(f"{count} prompts asked for, there are {len(every)}")
    return [
        f"This is the long story of a young {hero} who lived near a {place} and one day found an old {find} . It began"
        for hero, place, find in every[:count]
    ]


def reward(completion: str) -> float:
    """Mean length of the completion's words in characters: no two completions of a group are likely to tie."""
    words = completion.split()
    return sum(map(len, words)) / len(words) if words else 0.0


def random_prompts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of so many token ids drawn evenly from the vocabulary, special tokens (the first 16 ids) left out."""
    draw = random.Random(seed)
    return [[draw.randrange(16, vocabulary) for _ in range(length)] for _ in range(count)]
