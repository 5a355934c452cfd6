"""Strict JSON from a sentence: what is right, what is nearly right, and that the splits are apart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError, DataError
from upslope.tasks.base import load_task
from upslope.tasks.style import StrictJson
from upslope.types import Prompt

ANNA = Prompt(0, text="?", answer='{"name": "Anna", "age": 31}', metadata={"name": "Anna", "age": 31})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "Anna", "age": 31}', (1, 1, 1)),
        (' {"age":31,"name":"Anna"}\n', (1, 1, 1)),
        ('{"name": "Anna", "age": "31"}', (1, 1, 0)),
        ('{"name": "Anna", "age": 31.0}', (1, 1, 0)),
        ('{"name": "anna", "age": 31}', (1, 0, 1)),
        ('{"name": ["Anna"], "age": 30}', (1, 0, 0)),
        ('{"name": "Anna", "age": 31, "job": null}', (0, 0, 0)),
        ('{"name": "Anna"}', (0, 0, 0)),
        ('{"name": "Anna", "name": "Anna", "age": 31}', (0, 0, 0)),
        ('```json\n{"name": "Anna", "age": 31}\n```', (0, 0, 0)),
        ('Sure! {"name": "Anna", "age": 31}', (0, 0, 0)),
        ('{"name": "Anna", "age": NaN}', (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_verdicts_by_hand(text: str, parts: tuple[int, int, int]) -> None:
    (reward,) = StrictJson().rewards([ANNA], [text])
    assert tuple(reward.parts[name] for name in ("json", "name", "age")) == parts
    assert reward.value == sum(parts) / 3
    assert reward.correct is (sum(parts) == 3)


def test_true_is_no_age() -> None:
    one = replace(ANNA, metadata={"name": "Anna", "age": 1})
    (reward,) = StrictJson().rewards([one], ['{"name": "Anna", "age": true}'])
    assert not reward.correct


@given(st.one_of(st.text(max_size=60), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "age", "x"]), inner),
    max_leaves=6,
).map(json.dumps)))  # fmt: skip
def test_any_text_gets_a_judgement(text: str) -> None:
    (reward,) = StrictJson().rewards([ANNA], [text])
    assert reward.value is not None
    assert 0 <= reward.value <= 1


def test_demonstrations_are_right_and_splits_are_apart() -> None:
    task = load_task("strict_json")
    train, held_out = task.prompts("train", 300, seed=1), task.prompts("eval", 200, seed=2)
    assert not {p.key for p in train} & {p.key for p in held_out}
    assert train == task.prompts("train", 300, seed=1)
    assert train != task.prompts("train", 300, seed=3)
    replies = [task.demonstration(p)[-1].content for p in train]
    assert all(r.correct for r in task.rewards(train, replies))  # type: ignore[union-attr]
    assert train[0].messages[-1].content.startswith("Return a JSON object")
    assert train[0].metadata["sentence"] in train[0].messages[-1].content


def test_wrong_parameters() -> None:
    with pytest.raises(ConfigError, match="sentence"):
        load_task("strict_json:ask=Give JSON")
    with pytest.raises(DataError, match="distinct eval prompts"):
        load_task("strict_json").prompts("eval", 100_000, seed=0)
