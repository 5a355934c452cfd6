"""Returns and advantages along time: rows 2 to 5, 7, 26 (V = 0), 47 of the checklist."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.functional.masking import whiten
from upslope.functional.returns import (
    discounted_returns,
    gae,
    lambda_returns,
    length_adaptive_lambda,
    n_step_advantages,
    vtrace,
)

from . import definitions

DTYPES = [torch.float32, torch.float64, torch.int64, torch.int32, torch.bfloat16]
ONES = torch.ones(1, 3)


@pytest.mark.parametrize("dtype", DTYPES)
class TestWorkedExample:
    """Rewards (1, 1, 1), gamma 1/2, also as integers."""

    def test_row02_monte_carlo(self, dtype: torch.dtype) -> None:
        rewards = torch.ones(1, 3, dtype=dtype)
        assert discounted_returns(rewards, ONES, gamma=0.5).tolist() == [[1.75, 1.5, 1.0]]

    @pytest.mark.parametrize(
        ("lam", "expected"), [(1.0, [1.75, 1.5, 1.0]), (0.5, [1.3125, 1.25, 1.0]), (0.0, [1.0, 1.0, 1.0])]
    )
    def test_row03_gae_with_zero_values(self, dtype: torch.dtype, lam: float, expected: list[float]) -> None:
        rewards, values = torch.ones(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
        assert gae(rewards, values, ONES, gamma=0.5, lam=lam).tolist() == [expected]
        assert lambda_returns(rewards, values, ONES, gamma=0.5, lam=lam).tolist() == [expected]

    def test_td(self, dtype: torch.dtype) -> None:
        rewards, values = torch.ones(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=dtype)
        assert n_step_advantages(rewards, values, ONES, gamma=0.5, n=1).tolist() == [[1, 1, 1]]
        assert n_step_advantages(rewards, values, ONES, gamma=0.5, n=2).tolist() == [[1.5, 1.5, 1]]
        assert n_step_advantages(rewards, values, ONES, gamma=0.5, n=3).tolist() == [[1.75, 1.5, 1]]


def test_row03_hand_constants_with_values() -> None:
    r, v = torch.ones(1, 3).double(), torch.tensor([[0.3, -0.2, 0.7]]).double()
    advantages = gae(r, v, ONES, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.00625, 1.625, 0.3]]).double())
    torch.testing.assert_close(advantages + v, torch.tensor([[1.30625, 1.425, 1.0]]).double())


def test_the_last_reward_is_not_dropped() -> None:
    """Rewards (0, 0, 1): a reward for the whole answer reaches every token."""
    r, v = torch.tensor([[0, 0, 1]]), torch.zeros(1, 3)
    assert gae(r, v, ONES, gamma=1.0, lam=1.0).tolist() == [[1, 1, 1]]


@dataclass
class Case:
    """B rows of different lengths with skipped tokens, NaN wherever the mask is 0."""

    rewards: Tensor
    values: Tensor
    log_ratio: Tensor
    mask: Tensor
    bootstrap: Tensor

    def rows(self) -> list[tuple[list[float], list[float], list[float], float]]:
        picked = []
        for b in range(self.mask.shape[0]):
            on = self.mask[b]
            picked.append(
                (
                    self.rewards[b][on].tolist(),
                    self.values[b][on].tolist(),
                    self.log_ratio[b][on].tolist(),
                    float(self.bootstrap[b]),
                )
            )
        return picked

    def spread(self, rows: list[list[float]]) -> Tensor:
        out = torch.zeros(self.mask.shape, dtype=torch.float64)
        for b, row in enumerate(rows):
            out[b][self.mask[b]] = torch.tensor(row, dtype=torch.float64)
        return out


def case(seed: int, B: int = 6, T: int = 9) -> Case:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[0] = True
    mask[1] = False

    def noise() -> Tensor:
        return torch.randn(B, T, generator=g, dtype=torch.float64).masked_fill(~mask, math.nan)

    return Case(noise(), noise(), noise(), mask, torch.randn(B, generator=g, dtype=torch.float64))


GRID = [(g, lam) for g in (0.0, 0.7, 1.0) for lam in (0.0, 0.4, 1.0)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), GRID)
def test_row03_row05_against_the_definitions(seed: int, gamma: float, lam: float) -> None:
    c = case(seed)
    close = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(
        discounted_returns(c.rewards, c.mask, gamma=gamma, bootstrap_B=c.bootstrap),
        c.spread([definitions.returns(r, gamma, b) for r, _, _, b in c.rows()]),
        **close,
    )
    torch.testing.assert_close(
        gae(c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=c.bootstrap),
        c.spread([definitions.gae(r, v, gamma, lam, b) for r, v, _, b in c.rows()]),
        **close,
    )
    torch.testing.assert_close(
        lambda_returns(c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=c.bootstrap),
        c.spread([definitions.lambda_returns(r, v, gamma, lam, b) for r, v, _, b in c.rows()]),
        **close,
    )
    for n in (1, 2, 4, 20):
        torch.testing.assert_close(
            n_step_advantages(c.rewards, c.values, c.mask, gamma=gamma, n=n, bootstrap_B=c.bootstrap),
            c.spread(
                [
                    [definitions.n_step_return(r, v, t, n, gamma, b) - v[t] for t in range(len(r))]
                    for r, v, _, b in c.rows()
                ]
            ),
            **close,
        )
    for rho_clip, c_clip in ((1.0, 1.0), (2.0, 0.5), (1e9, 1e9)):
        advantages, targets = vtrace(
            c.log_ratio, c.rewards, c.values, c.mask, gamma=gamma, lam=lam,
            rho_clip=rho_clip, c_clip=c_clip, bootstrap_B=c.bootstrap,
        )  # fmt: skip
        oracle = [definitions.vtrace(w, r, v, gamma, lam, rho_clip, c_clip, b) for r, v, w, b in c.rows()]
        torch.testing.assert_close(advantages, c.spread([o[0] for o in oracle]), **close)
        torch.testing.assert_close(targets, c.spread([o[1] for o in oracle]), **close)


def every(c: Case, gamma: float = 0.9, lam: float = 0.6) -> list[Tensor]:
    bootstrap = c.bootstrap
    return [
        discounted_returns(c.rewards, c.mask, gamma=gamma, bootstrap_B=bootstrap),
        gae(c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap),
        lambda_returns(c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap),
        n_step_advantages(c.rewards, c.values, c.mask, gamma=gamma, n=2, bootstrap_B=bootstrap),
        *vtrace(c.log_ratio, c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap),
    ]


class TestIdentities:
    c = case(11)

    def test_lambda_one_is_monte_carlo_minus_v(self) -> None:
        c = self.c
        values = c.values.nan_to_num()
        g = discounted_returns(c.rewards, c.mask, gamma=0.9, bootstrap_B=c.bootstrap)
        expected = torch.where(c.mask, g - values, 0.0)
        advantages = gae(c.rewards, c.values, c.mask, gamma=0.9, lam=1.0, bootstrap_B=c.bootstrap)
        torch.testing.assert_close(advantages, expected)
        many = n_step_advantages(c.rewards, c.values, c.mask, gamma=0.9, n=100, bootstrap_B=c.bootstrap)
        torch.testing.assert_close(many, expected)

    def test_lambda_zero_is_the_td_error(self) -> None:
        c = self.c
        torch.testing.assert_close(
            gae(c.rewards, c.values, c.mask, gamma=0.9, lam=0.0, bootstrap_B=c.bootstrap),
            n_step_advantages(c.rewards, c.values, c.mask, gamma=0.9, n=1, bootstrap_B=c.bootstrap),
        )

    def test_row07_lambda_returns_minus_v_are_gae_before_any_whitening(self) -> None:
        c = self.c
        targets = lambda_returns(c.rewards, c.values, c.mask, gamma=0.9, lam=0.6, bootstrap_B=c.bootstrap)
        advantages = gae(c.rewards, c.values, c.mask, gamma=0.9, lam=0.6, bootstrap_B=c.bootstrap)
        torch.testing.assert_close((targets - c.values)[c.mask], advantages[c.mask])
        whitened = whiten(advantages, c.mask)
        assert not torch.allclose((targets - c.values)[c.mask], whitened[c.mask])

    def test_row26_zero_values_give_discounted_sums(self) -> None:
        c = self.c
        torch.testing.assert_close(
            gae(c.rewards, torch.zeros_like(c.values), c.mask, gamma=0.9, lam=0.5),
            discounted_returns(c.rewards, c.mask, gamma=0.45),
        )

    def test_vtrace_on_policy(self) -> None:
        c = self.c
        zero = torch.zeros_like(c.values)
        advantages, targets = vtrace(zero, c.rewards, c.values, c.mask, gamma=0.9, lam=0.6, bootstrap_B=c.bootstrap)
        expected = lambda_returns(c.rewards, c.values, c.mask, gamma=0.9, lam=0.6, bootstrap_B=c.bootstrap)
        torch.testing.assert_close(targets, expected)
        advantages, targets = vtrace(zero, c.rewards, c.values, c.mask, gamma=0.9, bootstrap_B=c.bootstrap)
        torch.testing.assert_close(
            advantages, gae(c.rewards, c.values, c.mask, gamma=0.9, lam=1.0, bootstrap_B=c.bootstrap)
        )
        torch.testing.assert_close(targets, discounted_returns(c.rewards, c.mask, gamma=0.9, bootstrap_B=c.bootstrap))

    def test_lam_per_row(self) -> None:
        c = self.c
        lam = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 0.3], dtype=torch.float64)
        for function in (gae, lambda_returns):
            together = function(c.rewards, c.values, c.mask, gamma=0.9, lam=lam, bootstrap_B=c.bootstrap)
            for b in range(6):
                s = slice(b, b + 1)
                alone = function(
                    c.rewards[s], c.values[s], c.mask[s], gamma=0.9, lam=float(lam[b]), bootstrap_B=c.bootstrap[s]
                )
                torch.testing.assert_close(together[s], alone)


def test_row03_truncation_bootstraps_and_termination_does_not() -> None:
    """The omitted gamma V(s_T) reaches step t scaled by (gamma lam)^(T-1-t)."""
    r, v = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    out = gae(r, v, torch.ones(2, 3), gamma=0.5, lam=0.5, bootstrap_B=torch.tensor([0.0, 8.0]))
    assert out.tolist() == [[0, 0, 0], [0.25, 1.0, 4.0]]


class TestInvariances:
    c = case(5)

    def with_fields(self, change) -> Case:
        c = self.c
        return Case(change(c.rewards), change(c.values), change(c.log_ratio), c.mask, c.bootstrap)

    @pytest.mark.parametrize("junk", [1e9, -1e9, math.inf, 0.0])
    def test_row04_what_is_masked_changes_no_bit(self, junk: float) -> None:
        dirty = self.with_fields(lambda x: x.masked_fill(~self.c.mask, junk))
        for a, b in zip(every(self.c), every(dirty), strict=True):
            assert torch.equal(a, b)
            assert (a[~self.c.mask] == 0).all()

    def test_row04_padding_width_changes_no_bit(self) -> None:
        c = self.c
        pad = lambda x: torch.cat([x, torch.full((6, 17), math.nan)], 1)  # noqa: E731
        wide = Case(
            pad(c.rewards), pad(c.values), pad(c.log_ratio),
            torch.cat([c.mask, torch.zeros(6, 17).bool()], 1), c.bootstrap,
        )  # fmt: skip
        for a, b in zip(every(c), every(wide), strict=True):
            assert torch.equal(a, b[:, :9])

    def test_row05_observation_tokens_are_skipped_not_zeroed(self) -> None:
        """A compact row and the same row with masked tokens inside give the same bits, gamma and lam below 1."""
        for b, (r, v, w, boot) in enumerate(self.c.rows()):
            if not r:
                continue
            row = [torch.tensor([x], dtype=torch.float64) for x in (r, v, w)]
            compact = Case(*row, torch.ones(1, len(r)).bool(), torch.tensor([boot], dtype=torch.float64))
            for a, c in zip(every(self.c), every(compact), strict=True):
                assert torch.equal(a[b][self.c.mask[b]], c[0])

    def test_row05_zeroing_an_observation_token_is_another_number(self) -> None:
        """Values and rewards set to 0 there, instead of skipped, are right only for gamma = lam = 1."""
        r = torch.tensor([[0.0, math.nan, 1.0]]).double()
        v = torch.tensor([[0.5, math.nan, 0.6]]).double()
        mask = torch.tensor([[1, 0, 1]])
        skipped = gae(r, v, mask, gamma=1.0, lam=0.5)
        torch.testing.assert_close(skipped, torch.tensor([[0.1 + 0.5 * 0.4, 0.0, 0.4]]).double())
        zeroed = gae(r.nan_to_num(), v.nan_to_num(), torch.ones(1, 3), gamma=1.0, lam=0.5)
        # delta_0 = 0 - 0.5, delta_1 = 0.6 - 0, delta_2 = 0.4
        assert zeroed[0, 0].item() == pytest.approx(-0.5 + 0.5 * 0.6 + 0.25 * 0.4)
        assert skipped[0, 0].item() == pytest.approx(0.3)

    def test_row10_permuting_rows_permutes_results(self) -> None:
        c, order = self.c, torch.tensor([3, 1, 5, 0, 4, 2])
        shuffled = Case(c.rewards[order], c.values[order], c.log_ratio[order], c.mask[order], c.bootstrap[order])
        for a, b in zip(every(c), every(shuffled), strict=True):
            assert torch.equal(a[order], b)

    def test_row04_gradients_are_finite_and_zero_where_masked(self) -> None:
        c = self.c
        rewards, values = c.rewards.clone().requires_grad_(), c.values.clone().requires_grad_()
        dirty = Case(rewards, values, c.log_ratio, c.mask, c.bootstrap)
        for out in every(dirty):
            gradients = torch.autograd.grad(out.square().sum(), (rewards, values), allow_unused=True, retain_graph=True)
            for gradient in gradients:
                if gradient is not None:
                    assert gradient.isfinite().all()
                    assert (gradient[~c.mask] == 0).all()

    def test_row21_no_gradient_into_the_ratio(self) -> None:
        c = self.c
        log_ratio = c.log_ratio.clone().requires_grad_()
        out = vtrace(log_ratio, c.rewards, c.values, c.mask, gamma=0.9)
        assert not any(x.requires_grad for x in out)

    def test_an_overflowing_ratio_is_clipped(self) -> None:
        big = torch.full((1, 3), 1e4)
        advantages, targets = vtrace(big, ONES, torch.zeros(1, 3), ONES, gamma=0.5, rho_clip=2.0)
        assert advantages.isfinite().all()
        assert targets.isfinite().all()


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_shift_of_rewards_by_a_potential_keeps_gae(seed: int, gamma: float, lam: float) -> None:
    """Potential-based shaping with Phi = V turns the TD error into the reward (Ng et al. 1999)."""
    c = case(seed)
    zero = torch.zeros_like(c.values)
    delta = n_step_advantages(c.rewards, c.values, c.mask, gamma=gamma, n=1, bootstrap_B=c.bootstrap)
    torch.testing.assert_close(
        gae(c.rewards, c.values, c.mask, gamma=gamma, lam=lam, bootstrap_B=c.bootstrap),
        gae(delta, zero, c.mask, gamma=gamma, lam=lam),
    )


def test_row47_length_adaptive_lambda() -> None:
    lengths = torch.arange(1, 21)
    assert (length_adaptive_lambda(lengths) == 0).all()
    assert length_adaptive_lambda(torch.tensor([40, 200, 0])).tolist() == pytest.approx([0.5, 0.9, 0.0])
    lam = length_adaptive_lambda(torch.arange(0, 10_000))
    assert ((lam >= 0) & (lam <= 1)).all()
    assert (lam.diff() >= 0).all()
    gae(torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3, 4), gamma=1.0, lam=length_adaptive_lambda(lengths[:3]))


def test_empty_rows_and_batches() -> None:
    for B, T in ((0, 3), (2, 0)):
        c = Case(*(torch.zeros(B, T) for _ in range(3)), torch.zeros(B, T).bool(), torch.zeros(B))
        for out in every(c):
            assert out.shape == (B, T)


OK = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(OK, torch.zeros(2, 4), OK, gamma=1, lam=1), r"values_BT \[2, 4\]"),
        (lambda: gae(OK, OK, torch.zeros(3, 2), gamma=1, lam=1), r"mask \[3, 2\]"),
        (lambda: gae(OK[0], OK[0], OK[0], gamma=1, lam=1), r"2 dimension\(s\), got shape \[3\]"),
        (lambda: gae(OK, OK, OK, gamma=1.5, lam=1), r"gamma must lie in \[0, 1\], got 1.5"),
        (lambda: gae(OK, OK, OK, gamma=math.nan, lam=1), "gamma"),
        (lambda: gae(OK, OK, OK, gamma=1, lam=-0.1), r"lam must lie in \[0, 1\], got -0.1"),
        (lambda: gae(OK, OK, OK, gamma=1, lam=torch.tensor([0.5, 1.5])), "lam must lie"),
        (lambda: gae(OK, OK, OK, gamma=1, lam=torch.ones(3)), r"shape \[2\], got \[3\]"),
        (lambda: gae(OK, OK, OK, gamma=1, lam=1, bootstrap_B=torch.zeros(3)), r"bootstrap_B must have shape \[2\]"),
        (lambda: discounted_returns(OK, OK, gamma=-1), "gamma"),
        (lambda: n_step_advantages(OK, OK, OK, gamma=1, n=0), "n must be at least 1, got 0"),
        (lambda: vtrace(OK, OK, OK, OK, gamma=1, rho_clip=0), "rho_clip"),
        (lambda: vtrace(OK, OK, OK, OK, gamma=1, lam=2), "lam"),
        (lambda: length_adaptive_lambda(torch.tensor([3]), alpha=0), "alpha"),
        (lambda: length_adaptive_lambda(torch.tensor([-1])), "negative"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
