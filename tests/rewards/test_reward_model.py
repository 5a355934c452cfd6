"""Rewards that are networks: added in the trainer's process, in order, weighted and named like all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_folder, tiny_tokenizer

from upslope.data.chat import encode_prompt
from upslope.data.examples import solutions_of, step_ends
from upslope.data.records import record_of
from upslope.errors import ConfigError, DataError
from upslope.models.decoder.network import Decoder
from upslope.models.files.loading import RewardSettings, load_model, load_reward_folder, save_reward_folder
from upslope.rewards.judge import InlineJudge, reward_metrics
from upslope.rewards.networks import AGGREGATES, RewardModel, load_reward_model
from upslope.rewards.summands import NETWORKS, Summand, Surroundings, load_reward, split_rewards
from upslope.tasks import Task
from upslope.types import Message, Prompt, Reward, Rollout, RolloutGroup
from upslope.workers.rewards import RewardPool, make_scorer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def rollout(prompt: Prompt, text: str, sample: int = 0, *, end: bool = True) -> Rollout:
    tokens = ids(text) + [1] * end
    zeros = [0.0] * len(tokens)
    finish = "stop" if end else "length"
    return Rollout(encode_prompt(TOKENIZER, prompt), tokens, [True] * len(tokens), zeros, zeros, finish, text, sample)


def groups_of(*texts: Sequence[str]) -> list[RolloutGroup]:
    prompts = [Prompt(i, (Message("user", f"Say {i}"),)) for i in range(len(texts))]
    return [
        RolloutGroup(p, [rollout(p, text, i) for i, text in enumerate(some)])
        for p, some in zip(prompts, texts, strict=True)
    ]


class Counting:
    """A network's reward that needs no network: the number of 'a', None where there is none."""

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        counts = [r.text.count("a") for g in groups for r in g.rollouts]
        return [Reward(float(n), {"as": float(n)}, None, None, 0.0, [(0, 1.0)]) if n else Reward(None) for n in counts]


class Fixed(Task):
    """Half a point and a verdict for everything."""

    name = "fixed"
    inline_safe = True

    def rewards(self, prompts: list[Prompt], completions: list[str]) -> list[Reward]:
        return [Reward(0.5, correct="b" in text, steps=[(1, 2.0)]) for text in completions]


def counting(*, around: Surroundings, times: int = 1) -> Counting:
    assert around.tokenizer is TOKENIZER
    return Counting()


AROUND = Surroundings(TOKENIZER, "cpu", Path("policy"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "counting", f"{__name__}:counting")


def test_weights_parts_steps_and_verdicts_are_added(registered: None) -> None:
    groups = groups_of(["aab", "a"], ["ab"])
    with make_scorer(Fixed(), ("task@2", "counting:times=3@0.1", "counting"), surroundings=AROUND) as scorer:
        assert isinstance(scorer, InlineJudge)
        counts = scorer.judge(groups)
    rewards = [r.reward for g in groups for r in g.rollouts]
    assert [r.value for r in rewards] == pytest.approx([1 + 2.2, 1 + 1.1, 1 + 1.1])
    assert rewards[0].parts == {"fixed": 0.5, "counting/as": 2.0, "counting-2/as": 2.0}
    assert [r.correct for r in rewards] == [True, False, True]
    assert rewards[0].steps == [(1, 4.0), (0, 0.1), (0, 1.0)]
    assert counts["reward/errors"] == 0
    assert reward_metrics(groups)["rewards/counting/as/mean"] == pytest.approx(4 / 3)


def test_one_failing_part_is_one_error_and_alone_it_needs_no_task(registered: None) -> None:
    groups = groups_of(["aa", "b"])
    with make_scorer(None, ("counting",), surroundings=AROUND) as scorer:
        assert scorer.judge(groups)["reward/errors"] == 1
    first, second = (r.reward for r in groups[0].rollouts)
    assert first.value == 2.0
    assert second.value is None
    assert "counting" in str(second.error)
    with make_scorer(None, ("counting",), surroundings=AROUND) as scorer, pytest.raises(DataError, match="counting"):
        scorer.judge(groups_of(["b"]))


def test_a_network_stands_beside_a_pool_of_workers(registered: None) -> None:
    groups = groups_of(["aa", "a"])
    with make_scorer(None, ("length:target=2", "counting"), processes=1, surroundings=AROUND) as scorer:
        assert isinstance(scorer, RewardPool)
        scorer.judge(groups)
    assert set(groups[0].rollouts[0].reward.parts) == {"length", "counting/as"}


def test_a_wrong_count_and_a_missing_policy_are_said(registered: None) -> None:
    def short(groups: Sequence[RolloutGroup]) -> list[Reward]:
        return [Reward(1.0)]

    with pytest.raises(DataError, match="1 judgements for 2"):
        InlineJudge(None, [Summand("short", short)]).judge(groups_of(["a", "b"]))
    with pytest.raises(ConfigError, match="needs a policy"):
        make_scorer(None, ("counting",))
    with pytest.raises(ConfigError, match="network"):
        load_reward("reward_model:path=x")
    with pytest.raises(ConfigError, match="no parameter 'around'"):
        make_scorer(None, ("counting:around=x",), surroundings=AROUND)


def test_a_function_of_a_file_may_have_a_network_s_name() -> None:
    plain, networks = split_rewards(("mine.py:reward_model@2", "reward_model:path=x@3"))
    assert plain == [("mine.py:reward_model", 2.0)]
    assert networks == [("reward_model:path=x", 3.0)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network with a random head, as an outcome and as a process model."""
    base = tiny_folder(tmp_path_factory.mktemp("base") / "base")
    model = load_model(base)
    assert isinstance(model, Decoder)
    torch.manual_seed(7)
    tensors = {n: p.detach() for n, p in model.named_parameters()} | {"score.weight": torch.randn(1, 32)}
    found = {"base": base}
    for kind in ("outcome", "process"):
        found[kind] = base.parent / kind
        settings = RewardSettings(kind, "min")  # type: ignore[arg-type]
        save_reward_folder(model, tensors, found[kind], settings, source_folder=base, pad_token_id=None)
    return found


def judge_of(folder: Path, **params: Any) -> RewardModel:
    return load_reward_model(str(folder), dtype="float32", **params, around=AROUND)


def alone(folder: Path, tokens: list[int]) -> torch.Tensor:
    """The head's word after each token, by the network's own forward pass over one sequence."""
    from upslope.models.attention.context import PackedContext

    model, head, _ = load_reward_folder(folder)
    with torch.no_grad():
        return head(model(torch.tensor(tokens), PackedContext([len(tokens)])))


def test_an_outcome_model_reads_the_last_sampled_token(folders: dict[str, Path]) -> None:
    groups = groups_of(["aa", "b", "a longer reply"], ["c"])
    whole = judge_of(folders["outcome"]).rewards(groups)
    split = judge_of(folders["outcome"], batch_tokens=1).rewards(groups)
    assert [r.value for r in whole] == [r.value for r in split]
    rollouts = [r for g in groups for r in g.rollouts]
    expected = [float(alone(folders["outcome"], r.prompt_tokens + r.tokens)[-1]) for r in rollouts]
    assert [r.value for r in whole] == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("aggregate", [*AGGREGATES, ""])
def test_a_process_model_judges_each_step(aggregate: str, folders: dict[str, Path]) -> None:
    groups = groups_of(["ab\nc\n\nd", "e"])
    rewards = judge_of(folders["process"], aggregate=aggregate).rewards(groups)
    first = groups[0].rollouts[0]
    logits = alone(folders["process"], first.prompt_tokens + first.tokens)[len(first.prompt_tokens) :]
    steps = [float(logits[t].sigmoid()) for t in (2, 4, 7)]
    assert [t for t, _ in rewards[0].steps] == [2, 4, 7]
    assert [p for _, p in rewards[0].steps] == pytest.approx(steps)
    wanted = {"min": min(steps), "prod": math.prod(steps), "last": steps[-1], "mean": sum(steps) / 3, "": min(steps)}
    assert rewards[0].value == pytest.approx(wanted[aggregate])
    assert len(rewards[1].steps) == 1


def test_what_cannot_be_read_is_that_sample_s_error(folders: dict[str, Path]) -> None:
    groups = groups_of(["x", "y" * 600, " \n "])
    groups[0].rollouts.append(rollout(groups[0].prompt, "", 3, end=False))
    rewards = judge_of(folders["process"]).rewards(groups)
    assert rewards[0].value is not None
    assert "512" in str(rewards[1].error)
    assert "no step" in str(rewards[2].error)
    assert "empty" in str(rewards[3].error)


def test_retokenizing_reads_the_text_in_its_own_template(folders: dict[str, Path]) -> None:
    """With the same tokenizer that is the same sequence, so the same score."""
    groups = groups_of(["aa", "bcd"])
    sampled = judge_of(folders["outcome"]).rewards(groups)
    for r in groups[0].rollouts:
        r.tokens, r.prompt_tokens = [5], [6]
    read = judge_of(folders["outcome"], retokenize=True).rewards(groups)
    assert [r.value for r in read] == [r.value for r in sampled]


@given(st.lists(st.text(alphabet="ab .é1", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=5))
def test_every_step_of_the_data_has_its_end(steps: list[str]) -> None:
    """The place of each label is the newline after its step, in bytes; the last one's is the end of the turn."""
    row = {"prompt": "x", "steps": steps, "labels": [0.5] * len(steps)}
    (solution,) = solutions_of([record_of(row, "row 1")], TOKENIZER, max_length=None).rows
    places = [t for t, label in enumerate(solution.labels) if label == label]
    lengths = [len(step.encode()) for step in steps]
    assert places == [sum(lengths[: i + 1]) + i for i in range(len(steps))]
    assert places[-1] == len(solution.labels) - 1


@given(st.text(alphabet="ab \n", max_size=12), st.booleans())
def test_step_ends_ignore_blank_lines(text: str, end: bool) -> None:
    tokens = ids(text) + [1] * end
    ends = step_ends(tokens, TOKENIZER)
    assert len(ends) == sum(bool(line.strip()) for line in text.split("\n"))
    assert ends == sorted(set(ends))
    assert all(0 <= e < len(tokens) for e in ends)
