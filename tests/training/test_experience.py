"""Judged rollouts to flat numbers: what is left out, how rewards are shaped, and that every view lines up."""

from __future__ import annotations

import pytest
import torch

from upslope.errors import DataError
from upslope.training.experience import Experience, group_rewards, shaped_rewards
from upslope.types import FinishReason, Prompt, Reward, Rollout, RolloutGroup


def rollout(length: int, value: float | None, finish: FinishReason = "stop", sample: int = 0) -> Rollout:
    tokens, logp = list(range(5, 5 + length)), [-0.1 * (t + 1) for t in range(length)]
    return Rollout(
        [1, 2, 3], tokens, [True] * length, logp, logp, finish, "", sample, reward=Reward(value, error="ill")
    )


def groups() -> list[RolloutGroup]:
    first = [rollout(2, 1.0), rollout(4, 0.0, "length", 1), rollout(3, None, "stop", 2)]
    second = [rollout(1, 0.5), rollout(4, 1.0, "length", 1)]
    return [RolloutGroup(Prompt(0, text="a"), first), RolloutGroup(Prompt(1, text="b"), second)]


def test_what_was_not_judged_or_was_cut_is_left_out() -> None:
    assert Experience.of(groups()).group_B == [0, 0, 1, 1]
    assert Experience.of(groups(), drop_truncated=True).group_B == [0, 1]
    with pytest.raises(DataError, match="ill"):
        Experience.of([RolloutGroup(Prompt(0, text="a"), [rollout(2, None)])])


def test_penalties_by_hand() -> None:
    """Missing EOS once per cut completion; the overlong points 0, -0.5 and -1 at lengths 2, 3 and 4 of 4."""
    x = Experience.of(groups())
    missing, _ = shaped_rewards(x, missing_eos_penalty=0.5, overlong_buffer=0, max_completion_length=4)
    assert missing.tolist() == [1.0, -0.5, 0.5, 0.5]
    overlong, _ = shaped_rewards(x, missing_eos_penalty=0.0, overlong_buffer=2, max_completion_length=4)
    assert overlong.tolist() == [1.0, -1.0, 0.5, 0.0]


def test_group_view_and_back() -> None:
    x = Experience.of(groups(), drop_truncated=True)
    rewards_PG, mask_PG, place_B = group_rewards(x, torch.tensor([1.0, 0.5]), 2)
    assert rewards_PG.flatten()[place_B].tolist() == [1.0, 0.5]
    assert int(mask_PG.sum()) == 2


def test_packed_batches_carry_each_token_its_own_numbers() -> None:
    x = Experience.of(groups())
    x.flat["place"] = torch.arange(x.num_trained)
    for budget in (4, 8, 100):
        batches, order = x.batches(range(x.size), budget)
        assert sorted(order) == list(range(x.size))
        for batch in batches:
            expected = [t for i in batch.fields["place"].tolist() for t in [all_tokens(x)[i]]]
            assert batch.targets_N.tolist() == expected


def all_tokens(x: Experience) -> list[int]:
    return [t for r in x.rollouts for t in r.tokens]


def test_weights_of_a_minibatch_sum_to_one_and_spare_the_others() -> None:
    x = Experience.of(groups())
    for normalizer in ("token", "sequence"):
        x.set_weights([1, 2], normalizer)
        per_sequence = x.sequence_sums(x.flat["weight"])
        assert float(per_sequence.sum()) == pytest.approx(1.0)
        assert per_sequence[[0, 3]].tolist() == [0.0, 0.0]
    assert sorted(i for part in x.minibatches(2, seed=0, epoch=3) for i in part) == [0, 1, 2, 3]
