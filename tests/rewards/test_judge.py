"""Scoring in this process: every kind of answer, every kind of mistake, weights, order, and what is reported."""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError, DataError
from upslope.rewards.judge import InlineJudge, WeightedSum, reward_metrics
from upslope.runs.store import Store
from upslope.tasks import Task
from upslope.types import Prompt, Reward, Rollout, RolloutGroup


def group(texts: list[str], key: int = 0, finish: str = "stop") -> RolloutGroup:
    rollouts = [
        Rollout([1], [2] * 3, [True, False, True], [0.0] * 3, [0.0] * 3, finish, t, i) for i, t in enumerate(texts)
    ]  # type: ignore[arg-type]
    return RolloutGroup(Prompt(key, text="q", answer="a"), rollouts)


class Custom(Task):
    """A task whose judgement is whatever a test wants."""

    name = "custom"
    inline_safe = True

    def __init__(self, answer) -> None:
        self.answer = answer

    def rewards(self, prompts, completions):
        return self.answer(completions)


def judged(answer, texts: list[str], rewards=()) -> tuple[list[Reward], dict[str, float]]:
    one = group(texts)
    with InlineJudge(WeightedSum(Custom(answer), rewards)) as scorer:
        counts = scorer.judge([one])
    return [rollout.reward for rollout in one.rollouts], counts


def test_every_kind_of_judgement() -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.25

    answers = [1, 0.5, True, {"a": 1, "b": -0.5}, Reward(2.0, {"x": 2.0}, correct=True, steps=[(0, 0.5)]), Scalar()]
    rewards, counts = judged(lambda texts: answers, ["t"] * 6)
    assert [r.value for r in rewards] == [1.0, 0.5, 1.0, 0.5, 2.0, 0.25]
    assert [r.parts for r in rewards][3:5] == [{"a": 1.0, "b": -0.5}, {"x": 2.0}]
    assert rewards[0].parts == {"custom": 1.0}
    assert rewards[4].correct is True
    assert rewards[4].steps == [(0, 0.5)]
    assert counts["reward/errors"] == 0


@pytest.mark.parametrize(
    ("answer", "needle"),
    [
        (float("nan"), "nan"),
        (-math.inf, "-inf"),
        (None, "no verdict"),
        ("1.0", "finite number"),
        (1j, "finite number"),
        ([1], "finite number"),
        ({}, "no parts"),
        ({"a": float("nan")}, "part 'a'"),
        ({"a": "x"}, "part 'a'"),
        (Reward(None), "without a value"),
        (Reward(None, error="judge\nwas down"), "judge was down"),
        (Reward(float("inf")), "not a finite number"),
        (Reward(1.0, {"a": float("nan")}), "not a finite number"),
        (Reward(1.0, steps=[(0, float("nan"))]), "not a finite number"),
        (5e38, "reward 5e+38 is beyond what float32 holds"),
        ({"a": 3e38, "b": 3e38}, "reward 6e+38 is beyond what float32 holds"),
        (Reward(1.0, steps=[(0, -5e38)]), "reward -5e+38 is beyond what float32 holds"),
        (Reward(None, {"half \ud800": 1.0}, error="half \ud800"), r"half \ud800"),
    ],
)
def test_an_unusable_judgement_is_an_error_of_its_sample(answer, needle: str) -> None:
    rewards, counts = judged(lambda texts: [answer, 1.0], ["a", "b"])
    assert rewards[0].value is None
    assert needle in str(rewards[0].error)
    assert "\n" not in str(rewards[0].error)
    assert rewards[1].value == 1.0
    assert counts["reward/errors"] == 1


def test_raising_costs_only_the_guilty_sample() -> None:
    def answer(texts: list[str]) -> list[float]:
        if "bad" in texts:
            raise KeyError("first line\nsecond")
        return [float(len(text)) for text in texts]

    rewards, counts = judged(answer, ["a", "bad", "ccc"])
    assert [r.value for r in rewards] == [1.0, None, 3.0]
    assert "KeyError" in str(rewards[1].error)
    assert "test_judge.py" in str(rewards[1].error)
    assert counts["reward/errors"] == 1
    assert counts["reward/timeouts"] == 0


def test_what_a_reward_says_can_be_stored(tmp_path: Path) -> None:
    """Half a surrogate pair in an error, a part's name, a prompt's answer or a text ended the run."""

    def answer(texts: list[str]) -> list[dict[str, float]]:
        if "bad" in texts:
            raise ValueError("cannot read \ud800")
        return [{"good \udfff": 1.0}] * len(texts)

    half = group(["bad", "ok", "text \udc00"])
    half.prompt = replace(half.prompt, answer="\ud800")
    with InlineJudge(WeightedSum(Custom(answer))) as scorer:
        scorer.judge([half])
    bad, good, _ = (rollout.reward for rollout in half.rollouts)
    assert bad.error is not None
    assert bad.error.startswith(r"custom: ValueError: cannot read \ud800 (test_judge.py:")
    assert good.parts == {r"good \udfff": 1.0}
    store = Store(tmp_path / "run.db")
    store.add_rollouts(1, [half])
    first, second, third = store.rollouts()
    assert (first.error, first.answer, second.parts, third.completion) == (
        bad.error,
        r"\ud800",
        good.parts,
        r"text \udc00",
    )
    largest = 3.4028234663852886e38
    assert judged(lambda texts: [largest], ["t"])[0][0].value == largest


def test_sys_exit_in_a_reward_is_an_error_too() -> None:
    def answer(texts: list[str]) -> list[float]:
        if "bad" in texts:
            raise SystemExit(2)
        return [1.0] * len(texts)

    rewards, _ = judged(answer, ["bad", "b"])
    assert [r.value for r in rewards] == [None, 1.0]


@pytest.mark.parametrize(
    ("answer", "needle"),
    [
        (lambda texts: [1.0], "returned 1 judgements for 2"),
        (lambda texts: [1.0] * 3, "returned 3 judgements for 2"),
        (lambda texts: [], "returned 0 judgements for 2"),
        (lambda texts: 1.0, "returned float"),
        (lambda texts: None, "returned NoneType"),
        (lambda texts: "ab", "returned str"),
        (lambda texts: {"a": 1, "b": 2}, "returned dict"),
        (lambda texts: (x for x in texts), "returned generator"),
        (lambda texts: asyncio.sleep(0), "async def"),
    ],
)
def test_a_wrong_return_names_function_and_remedy(answer, needle: str) -> None:
    with pytest.raises(DataError, match=needle) as caught:
        judged(answer, ["a", "b"])
    assert "custom" in str(caught.value)


def test_arrays_are_lists_too() -> None:
    numpy = pytest.importorskip("numpy")
    rewards, _ = judged(lambda texts: numpy.array([1.0, numpy.nan]), ["a", "b"])
    assert [r.value for r in rewards] == [1.0, None]


def test_nothing_judged_at_all_stops() -> None:
    with pytest.raises(DataError, match=r"any of 2 completions; the first: custom: .*nan"):
        judged(lambda texts: [float("nan")] * len(texts), ["a", "b"])


def test_weights_parts_and_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def two(prompts, completions):\n    return [{'x': 1, 'y': 2} for _ in completions]\n"
    )
    specs = ["task@2", f"{tmp_path / 'mine.py'}:two@0.5", "length:target=2", "length:target=4@-1"]
    rewards, _ = judged(lambda texts: [Reward(1.0, correct=False)] * len(texts), ["a b"], specs)
    assert rewards[0].parts == {"custom": 1.0, "two/x": 1.0, "two/y": 2.0, "length": 1.0, "length-2": 0.5}
    assert rewards[0].value == 2 * 1 + 0.5 * 3 + 1 * 1 - 0.5
    assert rewards[0].correct is False


def test_rewards_replace_the_tasks_own() -> None:
    rewards, _ = judged(lambda texts: [5.0] * len(texts), ["a b"], ["length:target=2"])
    assert rewards[0].value == 1.0
    assert rewards[0].parts == {"length": 1.0}


def test_one_failing_part_excludes_the_sample_and_keeps_the_others() -> None:
    rewards, _ = judged(lambda texts: [float("nan"), 1.0], ["a b", "a b"], ["task", "length:target=2"])
    assert rewards[0].value is None
    assert rewards[0].parts == {"length": 1.0}
    assert rewards[1].value == 2.0


def test_tokens_and_finish_reasons_are_given_to_who_asks(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "def asks(prompts, completions, *, num_tokens, finish_reasons):\n"
        "    return [n if r == 'length' else -n for n, r in zip(num_tokens, finish_reasons)]\n"
    )
    one = group(["a", "b"], finish="length")
    InlineJudge(WeightedSum(None, [f"{tmp_path / 'asks.py'}:asks", "length:target=2,unit=tokens"])).judge([one])
    assert [r.reward.parts for r in one.rollouts] == [{"asks": 2.0, "length": 1.0}] * 2


def test_a_wrong_parameter_value_stops_with_its_message() -> None:
    with pytest.raises(ConfigError, match="unit must be words"):
        InlineJudge(WeightedSum(None, ["length:target=2,unit=lines"])).judge([group(["a"])])


class Slow(Task):
    """Async: some answers take long, one raises, and arrival is not the order of samples."""

    name = "slow"

    async def rewards(self, prompts, completions):
        (text,) = completions
        await asyncio.sleep(float(text.split()[0]))
        if "raise" in text:
            raise ValueError("no")
        return [float(text.split()[0])]


def test_async_samples_are_awaited_together_and_keep_their_places() -> None:
    one = group(["0.3", "0.2", "0.1 raise", "0.25", "0"])
    start = time.perf_counter()
    InlineJudge(WeightedSum(Slow())).judge([one])
    assert time.perf_counter() - start < 0.8
    assert [r.reward.value for r in one.rollouts] == [0.3, 0.2, None, 0.25, 0.0]


def test_async_works_inside_a_running_loop() -> None:
    one = group(["0"])

    async def inside() -> None:
        InlineJudge(WeightedSum(Slow())).judge([one])

    asyncio.run(inside())
    assert one.rollouts[0].reward.value == 0.0


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6), st.randoms())
def test_rewards_do_not_depend_on_order(texts: list[str], order: random.Random) -> None:
    specs = ["length:target=3,unit=characters", "repetition:ngram=1", "json_object", "exact_match"]
    straight = group(texts)
    InlineJudge(WeightedSum(None, specs)).judge([straight])
    places = list(range(len(texts)))
    order.shuffle(places)
    mixed = group([texts[place] for place in places])
    InlineJudge(WeightedSum(None, specs)).judge([mixed])
    for rollout, place in zip(mixed.rollouts, places, strict=True):
        assert rollout.reward.value == straight.rollouts[place].reward.value
        assert rollout.reward.parts == straight.rollouts[place].reward.parts


def test_nothing_that_judges_is_an_error() -> None:
    class Silent(Task):
        name = "silent"

    with pytest.raises(ConfigError, match="task 'silent' has no reward of its own"):
        InlineJudge(WeightedSum(Silent()))
    with pytest.raises(ConfigError, match="no task is given"):
        InlineJudge(WeightedSum(None))
    with pytest.raises(ConfigError, match="there is none"):
        InlineJudge(WeightedSum(Silent(), ["task"]))


def test_metrics_by_hand() -> None:
    groups = [group(["a", "b"]), group(["c", "d"]), group(["e"])]
    values = [
        Reward(1.0, {"p": 1.0}, True),
        Reward(0.0, {"p": 0.0}, False),
        Reward(0.5, {"q": 2.0}),
        Reward(0.5),
        Reward(None),
    ]
    for rollout, reward in zip((r for g in groups for r in g.rollouts), values, strict=True):
        rollout.reward = reward
    metrics = reward_metrics(groups)
    assert metrics == {
        "reward": 0.5,
        "reward_std": pytest.approx(0.125**0.5),
        "frac_reward_zero_std": 0.5,
        "accuracy": 0.5,
        "rewards/p/mean": 0.5,
        "rewards/q/mean": 2.0,
    }
    assert reward_metrics([]) == {}


def test_the_rewards_of_steps_have_their_rewards_weight() -> None:
    rewards, _ = judged(lambda texts: [Reward(1.5, steps=[(0, 0.5), (2, 1.0)])] * len(texts), ["a b"], ["task@-0.5"])
    assert (rewards[0].value, rewards[0].steps) == (-0.75, [(0, -0.25), (2, -0.5)])


def test_the_verdict_is_the_tasks_wherever_it_stands() -> None:
    """Without one of the task's own it is the first that there is."""
    for task, verdict in ((False, False), (None, True)):
        for specs in (["exact_match", "task"], ["task", "exact_match"]):
            rewards, _ = judged(lambda texts, task=task: [Reward(0.0, correct=task)] * len(texts), ["a"], specs)
            assert rewards[0].correct is verdict, (task, specs)
