"""The sentiment task: neutral openings, apart for training and evaluation, and a bounded score of any text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vaderSentiment", reason="the extra `tasks` brings it")

from upslope.errors import DataError
from upslope.tasks import load_task
from upslope.tasks.style import built_in_openings

POSITIVE, NEGATIVE = load_task("sentiment"), load_task("sentiment:target=negative")
(PROMPT,) = POSITIVE.prompts("train", 1, seed=0)


def value(text: str, task=POSITIVE) -> float:
    return task.rewards([PROMPT], [text])[0].value


def test_openings_are_many_distinct_and_neutral() -> None:
    openings = built_in_openings()
    assert len(set(openings)) == len(openings) >= 200
    assert {value(opening) for opening in openings} == {0.0}


def test_train_and_eval_never_meet() -> None:
    train = {p.text for seed in range(3) for p in POSITIVE.prompts("train", 150, seed=seed)}
    held_out = {p.text for seed in range(3) for p in POSITIVE.prompts("eval", 40, seed=seed)}
    assert not train & held_out
    with pytest.raises(DataError, match="distinct train prompts"):
        POSITIVE.prompts("train", 400, seed=0)


def test_sign_and_verdict() -> None:
    good, bad = "a wonderful, happy day!", "horrible and sad."
    assert value(good) > 0.5
    assert value(bad) < -0.4
    assert value(good, NEGATIVE) == -value(good)
    verdicts = [reward.correct for reward in POSITIVE.rewards([PROMPT] * 3, [good, bad, "a table"])]
    assert verdicts == [True, False, False]


@given(st.text())
def test_scores_are_bounded_for_any_text(text: str) -> None:
    assert -1.0 <= value(text) <= 1.0


@pytest.mark.parametrize("text", ["", "\ud800", "\x00", "!" * 20_000, "good " * 20_000, ":)" * 5000])
def test_odd_texts(text: str) -> None:
    assert -1.0 <= value(text) <= 1.0


def test_own_openings_and_chat(tmp_path: Path) -> None:
    file = tmp_path / "openings.txt"
    file.write_text("".join(f"Opening number {i}\n\n" for i in range(40)))
    task = load_task("sentiment", openings=str(file), chat=True)
    prompt = task.prompts("train", 10, seed=0)[0]
    assert prompt.text is None
    assert prompt.messages[0].content.startswith("Continue this text with one positive sentence: Opening")
    with pytest.raises(DataError, match="cannot be read"):
        load_task(f"sentiment:openings={tmp_path / 'none.txt'}").prompts("train", 1, seed=0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read: a pipe or device"):
        load_task(f"sentiment:openings={tmp_path / 'pipe'}").prompts("train", 1, seed=0)
    with pytest.raises(DataError, match="no demonstrations"):
        task.demonstration(prompt)


def test_the_size_is_what_can_be_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "openings.txt"
    file.write_text("\n".join([*(f"Opening {i} was" for i in range(60)), "opening 3  was"]))
    task = load_task("sentiment", openings=str(file))
    assert task.divided
    assert not POSITIVE.divided
    assert (POSITIVE.size("train") + POSITIVE.size("eval"), task.size("train") + task.size("eval")) == (300, 60)
    for split in ("train", "eval"):
        assert len(task.prompts(split, task.size(split), seed=0)) == task.size(split)
        with pytest.raises(DataError):
            task.prompts(split, task.size(split) + 1, seed=0)
