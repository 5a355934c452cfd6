"""Reward shaping (rows 17, 35) and what a run reports (rows 13, 26, 45)."""

from __future__ import annotations

import math

import pytest
import torch

from upslope.functional.metrics import approx_kl, clip_fraction, explained_variance, token_ratios
from upslope.functional.policy_losses import clipped_surrogate
from upslope.functional.shaping import at_last_token, soft_overlong_penalty


def test_row35_soft_overlong_penalty_hand_points() -> None:
    lengths = torch.tensor([0, 80, 90, 100, 150])
    assert soft_overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.5, -1, -1]
    assert soft_overlong_penalty(85, 100, 20).item() == -0.25
    assert soft_overlong_penalty(lengths, 100, 0).tolist() == [0, 0, 0, 0, -1]
    assert soft_overlong_penalty(lengths, 100, 100).tolist() == pytest.approx([0, -0.8, -0.9, -1, -1])
    for bad in ((0, 0), (10, 11), (10, -1)):
        with pytest.raises(ValueError, match=r"max_length|cache"):
            soft_overlong_penalty(lengths, *bad)


def test_row17_the_score_stands_on_the_last_sampled_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    assert at_last_token(torch.tensor([5, 6, 7]), mask).tolist() == [[0, 5, 0, 0], [0, 0, 6, 0], [0, 0, 0, 7]]
    with pytest.raises(ValueError, match="row 1"):
        at_last_token(torch.tensor([5.0, 6.0]), torch.tensor([[1, 0], [0, 0]]))
    with pytest.raises(ValueError, match=r"shape \[3\], got \[2\]"):
        at_last_token(torch.tensor([5.0, 6.0]), mask)


def test_row13_at_the_first_pass_everything_is_exactly_zero() -> None:
    logp, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.7
    assert approx_kl(logp, logp, mask) == 0
    assert clip_fraction(logp, logp, torch.randn(4, 6), mask, clip_low=0.0, clip_high=0.0) == 0


def test_hand_constants() -> None:
    logp, old = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.2]).log()
    ones = torch.ones(2)
    assert approx_kl(logp, old, ones).item() == pytest.approx((2 - 1 - math.log(2)) / 2)
    for a, share in (([1.0, 1.0], 0.5), ([-1.0, 1.0], 0.0)):
        assert clip_fraction(logp, old, torch.tensor(a), ones, clip_low=0.2, clip_high=0.2) == share
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns, torch.ones(3)) == 1
    assert explained_variance(torch.zeros(3), returns, torch.ones(3)) == 0
    assert explained_variance(returns + 5, returns, torch.ones(3)) == 1
    assert explained_variance(-returns, returns, torch.ones(3)) == -3
    assert explained_variance(returns, ones.mean().expand(3), torch.ones(3)).isnan()


def test_clip_fraction_counts_the_tokens_without_gradient() -> None:
    logp, old, a = torch.randn(3, 400)
    logp.requires_grad_()
    clipped_surrogate(logp, old, a, clip_low=0.2, clip_high=0.28).sum().backward()
    assert logp.grad is not None
    fraction = clip_fraction(logp, old, a, torch.ones(400), clip_low=0.2, clip_high=0.28)
    assert fraction.item() == pytest.approx((logp.grad == 0).float().mean().item())
    assert 0 < fraction < 1
    assert not fraction.requires_grad


def test_token_ratios_are_what_the_clip_sees_before_any_mean() -> None:
    logp, old, a = torch.randn(3, 400)
    logp.requires_grad_()
    clipped_surrogate(logp, old, a, clip_low=0.2, clip_high=0.28).sum().backward()
    ratio, kl, clipped = token_ratios(logp, old, a, clip_low=0.2, clip_high=0.28)
    log_ratio = logp.detach() - old
    assert torch.equal(ratio, log_ratio.exp())
    assert torch.equal(kl, log_ratio.exp() - 1 - log_ratio)
    assert torch.equal(clipped, logp.grad == 0)
    assert not any(x.requires_grad for x in (ratio, kl, clipped))
    fraction = clip_fraction(logp, old, a, torch.ones(400), clip_low=0.2, clip_high=0.28)
    assert fraction == clipped.float().mean()
    with pytest.raises(ValueError, match="shapes must be equal"):
        token_ratios(logp, old[:1], a, clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e9])
def test_row45_padding_does_not_dilute_a_metric(junk: float) -> None:
    x, y, a = torch.randn(3, 2, 5)
    mask = torch.ones(2, 5).bool()

    def pad(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z, torch.full((2, 9), junk)], 1)

    wide = torch.cat([mask, torch.zeros(2, 9).bool()], 1)
    torch.testing.assert_close(approx_kl(pad(x), pad(y), wide), approx_kl(x, y, mask))
    torch.testing.assert_close(explained_variance(pad(x), pad(y), wide), explained_variance(x, y, mask))
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    torch.testing.assert_close(
        clip_fraction(pad(x), pad(y), pad(a), wide, **clips), clip_fraction(x, y, a, mask, **clips)
    )
