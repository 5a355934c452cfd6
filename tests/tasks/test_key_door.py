"""Key and door: pay by hand, noise that is fixed, balanced and unrelated to the key."""

from __future__ import annotations

import random
import statistics

import pytest

from upslope.errors import ConfigError
from upslope.tasks.base import load_task
from upslope.tasks.toys import ALPHABET, KeyDoor


def test_pay_by_hand() -> None:
    task = KeyDoor(steps=3, corridor=1, door=5.0, noise=2.0)
    (prompt,) = task.prompts("train", 1, seed=0)
    room = str(prompt.text)
    apples = [(i, task.worth(room, i, x)) for i, x in ((0, "a"), (1, "d"), (2, "e"))]
    total = sum(v for _, v in apples)
    with_key, without, short, more, spaced, lost = task.rewards(
        [prompt] * 6, ["adehi", "adegj", "adeh", "adehi0z", "a d e h i", "aaehi"]
    )
    assert lost.value == apples[0][1]
    assert not lost.correct
    assert with_key.value == total + 5.0
    assert with_key.steps == [*apples, (4, 5.0)]
    assert with_key.correct
    assert without.value == total
    assert without.steps == apples
    assert not without.correct
    assert short.value == total
    assert not short.correct
    assert (more.value, more.steps, spaced.value) == (with_key.value, with_key.steps, with_key.value)
    for reward in (with_key, without, short):
        assert reward.value == pytest.approx(sum(v for _, v in reward.steps))
        assert reward.value == reward.parts["apples"] + reward.parts["door"]


def test_noise_is_fixed_balanced_and_knows_nothing_of_the_key() -> None:
    task = KeyDoor(noise=1.0, door=2.0)
    rooms = [str(p.text) for p in task.prompts("train", 300, seed=0)]
    worth = [
        task.worth(room, step, letter)
        for room in rooms
        for step in range(12)
        for letter in ALPHABET[2 * step : 2 * step + 2]
    ]
    assert set(worth) == {1.0, -1.0}
    assert abs(statistics.fmean(worth)) < 0.05
    assert worth[:2] == [task.worth(rooms[0], 0, letter) for letter in "ab"]
    draw = random.Random(0)
    choices = [[draw.random() < 0.5 for _ in range(12)] for _ in rooms]
    prompts = task.prompts("train", 300, seed=0)
    taken = task.rewards(prompts, [task.way([*c, True, False, False, False]) for c in choices])
    left = task.rewards(prompts, [task.way([*c, False, False, False, False]) for c in choices])
    assert all(a.value - b.value == 2.0 for a, b in zip(taken, left, strict=True))  # type: ignore[operator]
    assert statistics.pstdev(r.value or 0.0 for r in left) == pytest.approx(12**0.5, rel=0.15)


def test_prompts_splits_and_demonstrations() -> None:
    task = load_task("key_door:steps=4,corridor=0")
    train, held = (task.prompts(split, 200, seed=1) for split in ("train", "eval"))
    assert not {p.text for p in train} & {p.text for p in held}
    assert task.prompts("train", 200, seed=1) == train
    replies = [task.demonstration(p)[-1].content for p in train]
    assert all(r[0] in "ab" and r[1] in "cd" and r[4] in "ij" and len(r) == 5 for r in replies)
    assert 0.4 < sum(reply[4] == "j" for reply in replies) / 200 < 0.6


@pytest.mark.parametrize(
    "spec", ["key_door:steps=0", "key_door:door=0.0", "key_door:noise=-1.0", "key_door:room=0", "key_door:steps=26"]
)
def test_bad_parameters_are_one_clear_line(spec: str) -> None:
    with pytest.raises(ConfigError, match="key_door") as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)
