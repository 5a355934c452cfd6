"""A task of your own: its prompts, its reward and the replies to imitate, in one file.

    upslope sft  --task examples/my_task.py:ReverseWord
    upslope grpo --task examples/my_task.py:ReverseWord:length=6
    upslope eval --task examples/my_task.py:ReverseWord

The model is asked to write a word backwards. Half of the reward is for the right length, so that there is something
to learn from before the first reply is fully right.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from upslope.tasks import Task, chat_prompt, select_prompts
from upslope.types import Message, Prompt, Reward

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


class ReverseWord(Task):
    """Write an invented word of `length` letters backwards."""

    name = "reverse_word"
    inline_safe = True  # comparing strings is quick and runs nothing: no worker process is needed

    def __init__(self, length: int = 4) -> None:
        self.length = length

    def prompts(self, split: str, n: int, *, seed: int) -> list[Prompt]:
        """`select_prompts` draws until it has n different ones, and keeps train and eval apart by their content."""
        return select_prompts(self._endless(split, seed), split, n, name=self.name)

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[Reward]:
        """One judgement per completion; every part is logged by its name."""
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            reply = completion.strip().lower()
            parts = {"right": 0.5 * (reply == prompt.answer), "length": 0.5 * (len(reply) == self.length)}
            rewards.append(Reward(value=sum(parts.values()), parts=parts, correct=reply == prompt.answer))
        return rewards

    def demonstration(self, prompt: Prompt) -> tuple[Message, ...]:
        """What supervised learning imitates."""
        return (*prompt.messages, Message("assistant", prompt.answer or ""))

    def _endless(self, split: str, seed: int) -> Iterator[Prompt]:
        draw = random.Random(f"{split} {seed}")
        while True:
            letters = (draw.choice(VOWELS if place % 2 else CONSONANTS) for place in range(self.length))
            word = "".join(letters)
            yield chat_prompt(f"Write the word '{word}' backwards. Reply with only that.", answer=word[::-1])
