"""The files under examples/ run as the documentation says."""

from __future__ import annotations

from pathlib import Path

import pytest

from upslope.tasks import load_task
from upslope.types import Rollout, RolloutGroup
from upslope.workers.rewards import RewardPool, make_scorer


def group(prompt, texts: list[str], finish: str = "stop") -> RolloutGroup:
    rollouts = [Rollout([1], [2], [True], [0.0], [0.0], finish, text, i) for i, text in enumerate(texts)]  # type: ignore[arg-type]
    return RolloutGroup(prompt, rollouts)


def test_my_task(root: Path) -> None:
    task = load_task(f"{root / 'examples' / 'my_task.py'}:ReverseWord:length=4")
    train, held_out = task.prompts("train", 100, seed=0), task.prompts("eval", 30, seed=1)
    assert not {p.messages for p in train} & {p.messages for p in held_out}
    assert train == load_task(str(task.spec)).prompts("train", 100, seed=0)
    good = task.demonstration(train[0])[-1].content
    assert len(good) == 4
    groups = [group(train[0], [good, "abcd", "x"])]
    with make_scorer(task) as scorer:
        scorer.judge(groups)
    assert [r.reward.value for r in groups[0].rollouts] == [1.0, 0.5, 0.0]
    assert [r.reward.correct for r in groups[0].rollouts] == [True, False, False]


def test_my_rewards(root: Path) -> None:
    file = root / "examples" / "my_rewards.py"
    rewards = [f"{file}:few_exclamations", f"{file}:sentences:wanted=2@0.5", f"{file}:ask_elsewhere"]
    (prompt,) = load_task(f"{root / 'examples' / 'my_task.py'}:ReverseWord").prompts("train", 1, seed=0)
    groups = [group(prompt, ["Please! Go.", "no!!!!!"])]
    with RewardPool(None, rewards) as pool:
        pool.judge(groups)
    first, second = (rollout.reward for rollout in groups[0].rollouts)
    assert first.parts == {
        "few_exclamations": -0.1,
        "sentences/count": 1.0,
        "sentences/finished": 0.5,
        "ask_elsewhere": 1.0,
    }
    assert first.value == pytest.approx(-0.1 + 0.5 * 1.5 + 1.0)
    assert second.value == pytest.approx(-0.5 + 0.5 * 0.5)
