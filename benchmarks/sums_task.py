"""Sums for the comparison with TRL: the same prompts and the same reward for both, in plain Python.

`prompts` and `reward` know nothing of upslope, so that the peer's process can import this file as well.
"""

from __future__ import annotations

import random
import re


def prompts(*, digits: int = 1, seed: int = 0) -> list[str]:
    """Every sum of two numbers of so many digits, such as "5+7=", shuffled."""
    pairs = [(a, b) for a in range(10**digits) for b in range(10**digits)]
    random.Random(seed).shuffle(pairs)
    return [f"{a}+{b}=" for a, b in pairs]


def answer(prompt: str) -> str:
    """The sum that a prompt asks for."""
    left, right = prompt.rstrip("=").split("+")
    return str(int(left) + int(right))


def reward(prompt: str, completion: str) -> float:
    """1 for the right number and nothing else; half the share of digits right at their place otherwise."""
    right, given = answer(prompt), completion.strip()
    if given == right:
        return 1.0
    if not re.fullmatch("[0-9]{1,3}", given):
        return 0.0
    return 0.5 * sum(x == y for x, y in zip(given.rjust(3, "x"), right.rjust(3, "y"), strict=True)) / len(right)


def digit_share(prompt: str, completion: str) -> float:
    """Share of the completion's characters that are digits: a dense reward that any language model can climb."""
    return sum(c.isascii() and c.isdigit() for c in completion) / len(completion) if completion else 0.0
