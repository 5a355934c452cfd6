"""What seeds the sampling of a step's prompts."""

from __future__ import annotations

from upslope.rollout.collect import sampling_keys
from upslope.types import Prompt


def test_a_prompt_alone_is_seeded_by_its_key() -> None:
    assert sampling_keys([Prompt(key=7, text="a"), Prompt(key=9, text="b")]) == [7, 9]


def test_a_prompt_given_again_draws_anew() -> None:
    twice = [Prompt(key=7, text="a"), Prompt(key=9, text="b"), Prompt(key=7, text="a"), Prompt(key=7, text="a")]
    keys = sampling_keys(twice)
    assert len(set(keys)) == 4
    assert keys[:2] == sampling_keys(twice[:2]), "what comes later changes nothing before it"
    largest = 2**48 - 1
    assert len(set(sampling_keys([Prompt(key=largest, text="a")] * 3 + [Prompt(key=0, text="c")]))) == 4
