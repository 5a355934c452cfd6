"""Advantages within a group: rows 8 to 10 and 36 (which groups carry a signal) of the checklist."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.functional.advantages import group_centered, group_normalized, has_signal, leave_one_out

FUNCTIONS = [group_centered, group_normalized, leave_one_out]


def test_hand_constants() -> None:
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 3]])
    assert group_centered(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.75, -0.75, -0.75, 2.25]]
    torch.testing.assert_close(leave_one_out(rewards), torch.tensor([[2, -2, -2, 2], [-3, -3, -3, 9]]) / 3)
    # sum of squares 1 -> std sqrt(1/3), population 1/2
    assert group_normalized(rewards, eps=0.0)[0, 0].item() == pytest.approx(0.5 * math.sqrt(3))
    assert group_normalized(rewards, eps=0.0, unbiased=False)[0, 0].item() == pytest.approx(1.0)
    assert group_normalized(rewards)[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))


@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=9))
@settings(deadline=None, max_examples=50)
def test_against_the_definition(group: list[tuple[float, bool]]) -> None:
    rewards = torch.tensor([[r if ok else math.nan for r, ok in group]], dtype=torch.float64)
    mask = torch.tensor([[ok for _, ok in group]])
    valid = [r for r, ok in group if ok]
    n = len(valid)
    flat = n < 2 or max(valid) == min(valid)
    for i, (r, ok) in enumerate(group):
        others = (math.fsum(valid) - r) / (n - 1) if n > 1 else 0.0
        expected = {
            group_centered: 0.0 if flat else r - statistics.fmean(valid),
            group_normalized: 0.0 if flat else (r - statistics.fmean(valid)) / (statistics.stdev(valid) + 1e-4),
            leave_one_out: 0.0 if flat else r - others,
        }
        for function, value in expected.items():
            assert function(rewards, mask)[0, i].item() == pytest.approx(value if ok else 0.0, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("c", [0.1, 0.3, 0.7, 1 / 3, -1e5 / 7])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_row08_a_constant_group_is_exactly_zero(function, c: float, dtype: torch.dtype) -> None:
    for G in range(1, 17):
        rewards = torch.full((2, G), c).to(dtype)
        rewards[1] = 0
        assert (function(rewards) == 0).all()
        with_hole = torch.cat([rewards, torch.full((2, 1), math.nan).to(dtype)], 1)
        mask = torch.ones(2, G + 1).bool()
        mask[:, -1] = False
        assert (function(with_hole, mask) == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
class TestEdges:
    def test_row09_a_group_of_one_is_zero_never_the_raw_reward(self, function) -> None:
        assert function(torch.tensor([[5.0]])).tolist() == [[0]]
        assert function(torch.tensor([[5.0, math.nan, math.nan]]), torch.tensor([[1, 0, 0]])).tolist() == [[0, 0, 0]]

    def test_row09_an_empty_group_is_zero(self, function) -> None:
        assert function(torch.full((1, 3), math.nan), torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
        assert function(torch.zeros(2, 0)).shape == (2, 0)
        assert function(torch.zeros(0, 3)).shape == (0, 3)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_row09_a_valid_reward_that_is_not_finite_is_an_error(self, function, bad: float) -> None:
        with pytest.raises(ValueError, match=r"rewards_PG\[0, 1\] is (nan|inf|-inf)"):
            function(torch.tensor([[1.0, bad]]))

    def test_shapes_are_checked(self, function) -> None:
        with pytest.raises(ValueError, match=r"got shape \[3\]"):
            function(torch.zeros(3))
        with pytest.raises(ValueError, match=r"rewards_PG \[2, 3\], mask \[3, 2\]"):
            function(torch.zeros(2, 3), torch.zeros(3, 2))

    def test_row04_masked_junk_changes_no_bit(self, function) -> None:
        rewards, mask = torch.randn(5, 6), torch.rand(5, 6) < 0.6
        results = [function(rewards.masked_fill(~mask, junk), mask) for junk in (0.0, 1e30, math.nan, math.inf)]
        for other in results[1:]:
            assert torch.equal(other, results[0])
        assert (results[0][~mask] == 0).all()

    def test_row10_permutations_of_groups_and_samples(self, function) -> None:
        rewards, mask = torch.randn(5, 6), torch.rand(5, 6) < 0.8
        base = function(rewards, mask)
        order = torch.randperm(5)
        assert torch.equal(function(rewards[order], mask[order]), base[order])
        samples = torch.randperm(6)
        torch.testing.assert_close(function(rewards[:, samples], mask[:, samples]), base[:, samples])

    def test_row10_each_group_stands_alone(self, function) -> None:
        rewards, mask = torch.randn(5, 6), torch.rand(5, 6) < 0.8
        alone = torch.cat([function(rewards[p : p + 1], mask[p : p + 1]) for p in range(5)])
        assert torch.equal(alone, function(rewards, mask))

    def test_a_shift_of_the_rewards_changes_nothing(self, function) -> None:
        rewards = torch.randn(3, 5, dtype=torch.float64)
        torch.testing.assert_close(function(rewards + 7), function(rewards))

    def test_advantages_sum_to_zero(self, function) -> None:
        assert function(torch.randn(4, 7, dtype=torch.float64)).sum(1).abs().max() < 1e-12

    def test_dtypes(self, function) -> None:
        assert function(torch.tensor([[0, 1]])).dtype == torch.float32
        assert function(torch.tensor([[0.0, 1.0]]).bfloat16()).dtype == torch.float32
        assert function(torch.tensor([[0.0, 1.0]]).double()).dtype == torch.float64


def test_leave_one_out_is_g_over_g_minus_one_times_centred() -> None:
    rewards = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(rewards), group_centered(rewards) * 7 / 6)


def test_normalised_is_invariant_to_scale() -> None:
    rewards = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(group_normalized(100 * rewards, eps=0.0), group_normalized(rewards, eps=0.0))


def test_row36_has_signal() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0], [5.0, 5.0, math.nan], [math.nan] * 3])
    assert has_signal(rewards, ~rewards.isnan()).tolist() == [False, True, False, False]
    rewards = torch.randint(2, (50, 4))
    assert torch.equal(has_signal(rewards), (group_centered(rewards) != 0).any(1))
    close = torch.tensor([0.3, 0.3]).nextafter(torch.tensor([0.3, 1.0]))  # equal but for the last bit of a float32
    assert bool(has_signal(close[None])) is bool(close.max() > close.min()) is True


def test_negative_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="eps"):
        group_normalized(torch.zeros(1, 2), eps=-1.0)
