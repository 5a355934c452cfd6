"""Rollouts that waited belong to their prompts: where the rows are others after a resume, they are not used."""

from __future__ import annotations

import json

import pytest

from upslope.loop.sampler import RolloutQueue, Sampled
from upslope.types import Prompt, Reward, Rollout, RolloutGroup

PROMPTS = [Prompt(key=100 + i, text=f"prompt {i}", answer=str(i)) for i in range(4)]


def filled() -> RolloutQueue:
    """Two batches wait: answers to prompts 1 and 3."""
    queue = RolloutQueue(2, PROMPTS)
    for place in (1, 3):
        said = Rollout([1, 2], [3], [True], [-0.5], [-0.5], "stop", "x", 0, version=place, reward=Reward(1.0))
        queue.waiting.append(Sampled([RolloutGroup(PROMPTS[place], [said])], {"reward": 1.0}))
    return queue


def resumed(prompts: list[Prompt]) -> RolloutQueue:
    old, new = filled(), RolloutQueue(2, prompts)
    new.load(old.tensors(), json.loads(json.dumps(old.state())))
    return new


@pytest.mark.parametrize(
    "prompts",
    [PROMPTS[1:], [*PROMPTS[:3], Prompt(key=7, text="another")], PROMPTS[:3], PROMPTS[::-1]],
    ids=["shifted", "one is another", "fewer", "turned round"],
)
def test_answers_to_other_prompts_are_sampled_anew(prompts: list[Prompt], capsys: pytest.CaptureFixture[str]) -> None:
    assert resumed(prompts).waiting == []
    assert "sampled anew" in capsys.readouterr().err


def test_the_same_prompts_keep_their_answers_and_more_prompts_do_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    again = resumed([*PROMPTS, Prompt(key=7, text="another")])
    assert [batch.groups[0].prompt for batch in again.waiting] == [PROMPTS[1], PROMPTS[3]]
    assert [batch.groups[0].rollouts[0].version for batch in again.waiting] == [1, 3]
    assert capsys.readouterr().err == ""
