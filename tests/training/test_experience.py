"""Judged rollouts to flat numbers: what is left out, how rewards are shaped, and that every view lines up."""

from __future__ import annotations

import pytest
import torch

from upslope.errors import DataError
from upslope.options import RLOptions
from upslope.training.experience import Experience, group_rewards, shaped_rewards
from upslope.training.step import Outputs
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
    missing, _ = shaped_rewards(x, RLOptions(missing_eos_penalty=0.5, overlong_buffer=0, max_completion_length=4))
    assert missing.tolist() == [1.0, -0.5, 0.5, 0.5]
    overlong, _ = shaped_rewards(x, RLOptions(missing_eos_penalty=0.0, overlong_buffer=2, max_completion_length=4))
    assert overlong.tolist() == [1.0, -1.0, 0.5, 0.0]


def test_group_view_and_back() -> None:
    x = Experience.of(groups(), drop_truncated=True)
    rewards_PG, mask_PG, place_B = group_rewards(x, torch.tensor([1.0, 0.5]), 2)
    assert rewards_PG.flatten()[place_B].tolist() == [1.0, 0.5]
    assert int(mask_PG.sum()) == 2


def test_packed_batches_carry_each_token_its_own_numbers() -> None:
    x = Experience.of(groups())
    x.values = torch.arange(x.num_trained)
    for budget in (4, 8, 100):
        batches, order = x.batches(range(x.size), budget)
        assert sorted(order) == list(range(x.size))
        for batch in batches:
            expected = [t for i in batch.fields["values"].tolist() for t in [all_tokens(x)[i]]]
            assert batch.targets_N.tolist() == expected


def all_tokens(x: Experience) -> list[int]:
    return [t for r in x.rollouts for t in r.tokens]


def test_weights_of_a_minibatch_sum_to_one_and_spare_the_others() -> None:
    x = Experience.of(groups())
    for normalizer in ("token", "sequence"):
        x.set_weights([1, 2], normalizer)
        per_sequence = x.sequence_sums(x.weight)
        assert float(per_sequence.sum()) == pytest.approx(1.0)
        assert per_sequence[[0, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prompts", [1, 5, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
def test_minibatches_hold_every_prompt_whole_and_once_per_epoch(prompts: int, parts: int) -> None:
    made = [
        RolloutGroup(Prompt(g, text="a"), [rollout(2, 1.0, sample=i) for i in range(1 + g % 3)]) for g in range(prompts)
    ]
    x = Experience.of(made)
    seen = []
    for epoch in range(4):
        sets = x.minibatches(parts, seed=1, epoch=epoch)
        assert len(sets) == min(parts, prompts)
        assert sorted(i for part in sets for i in part) == list(range(x.size))
        owners = [{x.group_B[i] for i in part} for part in sets]
        assert sum(map(len, owners)) == prompts, "a prompt's completions were torn apart"
        assert max(map(len, owners)) - min(map(len, owners)) <= 1
        assert sets == x.minibatches(parts, seed=1, epoch=epoch)
        seen.append([sorted(part) for part in sets])
    if parts > 1 and prompts > 2:
        assert any(sets != seen[0] for sets in seen[1:]), "every epoch has the same minibatches"
        assert any(x.minibatches(parts, seed=s, epoch=0) != x.minibatches(parts, seed=1, epoch=0) for s in (2, 3, 4))


def with_a_tool() -> list[RolloutGroup]:
    """A rollout in which a tool put two of five tokens, and a plain one; sampled by a filtered distribution."""
    nan = float("nan")
    mask = [True, False, False, True, True]
    own, drawn = [-1.0, nan, nan, -2.0, -3.0], [-0.5, nan, nan, -1.5, -2.5]
    odd = Rollout([1, 2], [11, 12, 13, 14, 15], mask, drawn, own, "stop", "", 0, reward=Reward(1.0))
    plain = Rollout([1, 2], [21, 22], [True, True], [-0.25, -0.75], [-4.0, -5.0], "stop", "", 1, reward=Reward(0.0))
    return [RolloutGroup(Prompt(0, text="a"), [odd]), RolloutGroup(Prompt(1, text="b"), [plain])]


def test_observed_tokens_are_read_and_never_trained_on() -> None:
    x = Experience.of(with_a_tool())
    assert x.num_trained == 5
    assert x.policy_logprobs.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert x.sampling_logprobs.tolist() == [-0.5, -1.5, -2.5, -0.25, -0.75]
    assert x.padded(x.policy_logprobs).tolist() == [[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]
    assert torch.equal(x.unpadded(x.padded(x.policy_logprobs)), x.policy_logprobs)
    x.values = torch.arange(5)
    for budget in (1, 100):
        batches, _ = x.batches(range(2), budget)
        found = {int(i): int(t) for b in batches for i, t in zip(b.fields["values"], b.targets_N, strict=True)}
        assert found == {0: 11, 1: 14, 2: 15, 3: 21, 4: 22}
        for batch in batches:  # each target follows, in the packed row before it, what really stood before it
            before = dict(zip(batch.targets_N.tolist(), batch.tokens_T[batch.rows_N].tolist(), strict=True))
            assert before.items() <= {11: 2, 14: 13, 15: 14, 21: 2, 22: 21}.items()


def test_what_a_network_says_comes_back_in_the_experiences_order() -> None:
    """Whatever the micro-batches' order: here outputs that are the tokens' and the sequences' own numbers."""
    x = Experience.of(groups()[::-1])  # the longer group last, and packed first
    x.values = torch.arange(x.num_trained)
    for members in ([0, 1, 2, 3], [3, 2, 1, 0]):
        batches, order = x.batches(members, 8)
        said = Outputs(
            logp_N=torch.cat([b.fields["values"] for b in batches]),
            values_N=torch.cat([10 * b.fields["values"] for b in batches]),
            final_B=torch.tensor(order),
        )
        assert said.logp_N.tolist() != list(range(x.num_trained))
        back = x.in_order(said, order)
        assert back.logp_N.tolist() == list(range(x.num_trained))
        assert back.values_N.tolist() == [10 * i for i in range(x.num_trained)]
        assert back.final_B.tolist() == [0, 1, 2, 3]
