"""Policy losses: rows 13, 21, 24, 33, 34, 38 of the checklist, with hand values and definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.functional.masking import masked_sum
from upslope.functional.policy_losses import (
    clipped_is_reinforce,
    clipped_surrogate,
    importance_weights,
    reinforce,
    sequence_clipped_surrogate,
    soft_gated,
)

from . import definitions


def surrogate(ratio: float, advantage: float, **clips: float) -> tuple[float, float]:
    """(loss, d loss / d logp) of clipped_surrogate at one token."""
    options = {"clip_low": 0.2, "clip_high": 0.2, **clips}
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(logp, torch.zeros(1).double(), torch.tensor([advantage], dtype=torch.float64), **options)
    loss.sum().backward()
    assert logp.grad is not None
    return loss.item(), logp.grad.item()


class TestWorkedExamples:
    def test_the_ratio(self) -> None:
        """0.7 / 0.6 = 1.17, inside the clip: the loss is -ratio * A."""
        logp, old = torch.tensor([0.7]).double().log(), torch.tensor([0.6]).double().log()
        loss = clipped_surrogate(logp, old, torch.tensor([1.0]).double(), clip_low=0.2, clip_high=0.2)
        assert loss.item() == pytest.approx(-0.7 / 0.6)

    def test_row24_ratio_1_2_lies_on_the_boundary(self) -> None:
        loss, _ = surrogate(1.2, 2.0)
        assert loss == pytest.approx(-2.4)

    def test_row24_ratio_1_3_is_clipped_with_gradient_zero(self) -> None:
        loss, gradient = surrogate(1.3, 2.0)
        assert loss == pytest.approx(-2.4)
        assert gradient == 0


class TestClippedSurrogate:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "gradient"),
        [
            (1.5, 2.0, -2.4, 0.0),  # raised a good token enough
            (0.5, 2.0, -1.0, -1.0),  # lowered a good token: pulled back
            (1.5, -2.0, 3.0, 3.0),  # raised a bad token: pulled back
            (0.5, -2.0, 1.6, 0.0),  # lowered a bad token enough
            (1.1, 2.0, -2.2, -2.2),
            (0.9, -2.0, 1.8, 1.8),
            (1.5, 0.0, 0.0, 0.0),
        ],
    )
    def test_row24_the_four_branches(self, ratio: float, advantage: float, loss: float, gradient: float) -> None:
        assert surrogate(ratio, advantage) == pytest.approx((loss, gradient))

    def test_row24_unequal_bounds(self) -> None:
        assert surrogate(1.25, 1.0, clip_high=0.28) == pytest.approx((-1.25, -1.25))
        assert surrogate(1.3, 1.0, clip_high=0.28) == pytest.approx((-1.28, 0.0))
        assert surrogate(0.85, -1.0, clip_low=0.1) == pytest.approx((0.9, 0.0))
        assert surrogate(0.001, -1.0, clip_low=10.0, clip_high=10.0) == pytest.approx((0.001, 0.001))

    def test_row24_dual_clip(self) -> None:
        assert surrogate(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
        assert surrogate(2.5, -2.0, dual_clip=3.0) == pytest.approx((5.0, 5.0))
        assert surrogate(5.0, 2.0, dual_clip=3.0) == pytest.approx((-2.4, 0.0))

    @given(st.floats(-3, 3), st.floats(-5, 5), st.floats(0, 1), st.floats(0, 1))
    @settings(deadline=None, max_examples=50)
    def test_against_the_definition(self, log_ratio: float, a: float, low: float, high: float) -> None:
        ratio = math.exp(log_ratio)
        oracle = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        assert surrogate(ratio, a, clip_low=low, clip_high=high)[0] == pytest.approx(oracle, abs=1e-12)

    def test_row13_at_ratio_one_the_value_is_minus_a_and_the_gradient_reinforces(self) -> None:
        logp, a = torch.randn(9, requires_grad=True), torch.randn(9)
        loss = clipped_surrogate(logp, logp.detach(), a, clip_low=0.2, clip_high=0.2)
        assert torch.equal(loss, -a)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        (expected,) = torch.autograd.grad(reinforce(logp, a).sum(), logp)
        assert torch.equal(gradient, expected)

    def test_row38_overflow(self) -> None:
        """A good token's overflowing ratio is clipped, gradient 0; a bad token's shows as an infinite loss."""
        logp = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
        loss = clipped_surrogate(
            logp, torch.full((3,), -1e4), torch.tensor([1.0, -1.0, 0.0]), clip_low=0.2, clip_high=0.2
        )
        assert loss.tolist() == [pytest.approx(-1.2), math.inf, 0.0]
        loss[[0, 2]].sum().backward()
        assert logp.grad is not None
        assert logp.grad.tolist() == [0, 0, 0]


def test_reinforce_hand_values_and_the_product_inside_the_sum() -> None:
    logp, a = torch.tensor([-1.0, -2.0]), torch.tensor([3, -1])
    assert reinforce(logp, a).tolist() == [3.0, -2.0]
    assert -logp.mean() * a.float().mean() != reinforce(logp, a).mean()


def test_sequence_clipped_surrogate_hand_values() -> None:
    """Log-ratios (0.3, 0.1) and one masked token: s = exp(0.2); advantages of both signs."""
    logp = torch.tensor([[0.3, 9.0, 0.1]] * 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 0]])
    a = torch.tensor([2.0, -2.0, 5.0]).double()
    loss = sequence_clipped_surrogate(logp, torch.zeros(3, 3).double(), a, mask, clip_low=0.3, clip_high=0.3)
    assert loss.tolist() == pytest.approx([-2 * math.exp(0.2), 2 * math.exp(0.2), 0.0])
    loss.sum().backward()
    # gradient: s A / |y| on each trained token
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-math.exp(0.2), 0.0, -math.exp(0.2)])
    assert logp.grad[2].tolist() == [0, 0, 0]
    loss = sequence_clipped_surrogate(logp, torch.zeros(3, 3).double(), a, mask, clip_low=0.1, clip_high=0.1)
    assert loss.tolist() == pytest.approx([-2.2, 2 * math.exp(0.2), 0.0])


def test_cispo_hand_values() -> None:
    """The cap is 1 + clip_high; the gradient is never dropped."""
    logp = torch.tensor([math.log(2.0), math.log(1.1), math.log(0.1)], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([3.0, 3.0, 3.0]).double()
    old = torch.zeros(3).double()
    loss = clipped_is_reinforce(logp, old, a, clip_high=0.28)
    assert loss.tolist() == pytest.approx([-1.28 * 3 * math.log(2), -1.1 * 3 * math.log(1.1), -0.1 * 3 * math.log(0.1)])
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == pytest.approx([-3.84, -3.3, -0.3])
    (gradient,) = torch.autograd.grad(clipped_is_reinforce(logp, old, a, clip_high=0.28, clip_low=0.2).sum(), logp)
    assert gradient.tolist() == pytest.approx([-3.84, -3.3, -2.4])


@given(st.floats(-2, 2), st.floats(-3, 3))
@settings(deadline=None, max_examples=50)
def test_soft_gate_against_the_definition(log_ratio: float, a: float) -> None:
    tau = 1.0 if a > 0 else 1.05
    oracle = -4 / tau * definitions.sigmoid(tau * (math.exp(log_ratio) - 1)) * a
    logp, old, advantage = torch.tensor([[log_ratio], [0.0], [a]], dtype=torch.float64)
    value = soft_gated(logp, old, advantage)
    assert value.item() == pytest.approx(oracle, rel=1e-9, abs=1e-12)


def test_row13_soft_gate_at_ratio_one() -> None:
    logp, a = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, -2, 0, 3, -1, 2]).double()
    (gradient,) = torch.autograd.grad(soft_gated(logp, logp.detach(), a).sum(), logp)
    torch.testing.assert_close(gradient, -a)


class TestImportanceWeights:
    train = torch.tensor([[2.0, 0.5, 7.0]]).log()
    rollout = torch.tensor([[1.0, 1.0, math.nan]]).log()
    mask = torch.tensor([[1, 1, 0]])

    def weights(self, **options) -> list[float]:
        return importance_weights(self.train, self.rollout, self.mask, **{"high": 100.0, **options})[0].tolist()

    def test_row34_levels(self) -> None:
        assert self.weights(level="token") == pytest.approx([2, 0.5, 0])
        assert self.weights(level="sequence") == pytest.approx([1, 1, 0])
        assert self.weights(level="geometric") == pytest.approx([1, 1, 0])
        longer = importance_weights(
            torch.tensor([[2.0, 2.0, 2.0]]).log(), torch.zeros(1, 3), torch.ones(1, 3), level="geometric", high=9
        )
        assert longer[0].tolist() == pytest.approx([2, 2, 2])

    def test_row33_truncate_and_mask_on_either_side(self) -> None:
        """The ratio is train / rollout: 2 lies above [0.6, 1.9], 0.5 below."""
        assert self.weights(mode="truncate", low=0.6, high=1.9) == pytest.approx([1.9, 0.6, 0])
        assert self.weights(mode="truncate", high=1.9) == pytest.approx([1.9, 0.5, 0])
        assert self.weights(mode="mask", low=0.4, high=1.9) == pytest.approx([0, 0.5, 0])
        assert self.weights(mode="mask", low=0.6, high=5.0) == pytest.approx([2, 0, 0])
        assert self.weights(mode="mask", level="sequence", low=0.9, high=1.1) == pytest.approx([1, 1, 0])
        assert self.weights(mode="mask", level="sequence", low=1.1, high=2) == [0, 0, 0]

    def test_equal_policies_weigh_one_exactly(self) -> None:
        logp, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.5
        for level in ("token", "sequence", "geometric"):
            assert torch.equal(importance_weights(logp, logp, mask, level=level, high=1.0), mask.float())

    def test_row38_overflow_is_truncated(self) -> None:
        huge = importance_weights(torch.zeros(1, 2), torch.full((1, 2), -1e4), torch.ones(1, 2), high=2.0)
        assert huge.tolist() == [[2, 2]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"level": "word"}, "'word'"),
            ({"mode": "drop"}, "'drop'"),
            ({"low": 3.0, "high": 2.0}, "low"),
            ({"high": 0.0}, "high"),
        ],
    )
    def test_wrong_options_are_refused(self, options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.weights(**options)


def all_losses(logp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {
        "reinforce": masked_sum(reinforce(logp, a), mask),
        "ppo": masked_sum(clipped_surrogate(logp, old, a, clip_low=0.2, clip_high=0.28), mask),
        "dual": masked_sum(clipped_surrogate(logp, old, a, clip_low=0.2, clip_high=0.2, dual_clip=1.5), mask),
        "cispo": masked_sum(clipped_is_reinforce(logp, old, a, clip_high=0.28, clip_low=0.5), mask),
        "sapo": masked_sum(soft_gated(logp, old, a), mask),
        "gspo": sequence_clipped_surrogate(logp, old, a[:, 0], mask, clip_low=0.2, clip_high=0.2).sum(),
        "is": masked_sum(importance_weights(logp, old, mask, high=2.0) * logp, mask),
    }


NAMES = ["reinforce", "ppo", "dual", "cispo", "sapo", "gspo", "is"]


class TestInvariances:
    logp, old, a = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    mask[4] = False

    def run(self, name: str, logp: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logp.clone().requires_grad_()
        value = all_losses(leaf, old, a, mask)[name]
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e9, -1e9])
    def test_row04_masked_junk_changes_neither_value_nor_gradient(self, name: str, junk: float) -> None:
        value, gradient = self.run(name, self.logp, self.old, self.a, self.mask)
        assert (gradient[~self.mask] == 0).all()
        dirty = [x.masked_fill(~self.mask, junk) for x in (self.logp, self.old, self.a)]
        for i in range(3):
            if i == 0 and name == "is":
                continue  # there logp itself stands in the caller's product
            args = [self.logp, self.old, self.a]
            args[i] = dirty[i]
            other_value, other_gradient = self.run(name, *args, self.mask)
            assert torch.equal(value, other_value)
            assert torch.equal(gradient, other_gradient)

    @pytest.mark.parametrize("name", NAMES)
    def test_row10_row11_split_and_permutation(self, name: str) -> None:
        value, gradient = self.run(name, self.logp, self.old, self.a, self.mask)
        order = torch.tensor([3, 0, 4, 2, 1])
        parts = [
            self.run(name, *(x[order[i : i + 2]] for x in (self.logp, self.old, self.a, self.mask)))
            for i in range(0, 5, 2)
        ]
        torch.testing.assert_close(sum(p[0] for p in parts), value)
        assert torch.equal(torch.cat([p[1] for p in parts]), gradient[order])

    @pytest.mark.parametrize("name", NAMES)
    def test_row21_only_logp_gets_a_gradient(self, name: str) -> None:
        logp, old, a = (x.clone().requires_grad_() for x in (self.logp, self.old, self.a))
        all_losses(logp, old, a, self.mask)[name].backward()
        assert logp.grad is not None
        assert old.grad is None
        assert a.grad is None

    # not CISPO: its weight is a constant by definition; the hand values cover it
    @pytest.mark.parametrize("name", ["reinforce", "ppo", "dual", "sapo", "gspo"])
    def test_gradients_against_numerical_differences(self, name: str) -> None:
        logp, old, a = (x.double() for x in (self.logp, self.old, self.a))
        assert torch.autograd.gradcheck(lambda x: all_losses(x, old, a, self.mask)[name], (logp.requires_grad_(),))

    def test_an_unmasked_nan_stays_visible(self) -> None:
        bad = self.old.clone()
        bad[0, 0] = math.nan
        for name, loss in all_losses(self.logp, bad, self.a, self.mask).items():
            assert loss.isnan() or name == "reinforce"

    def test_bfloat16_is_computed_in_float32(self) -> None:
        for loss in all_losses(self.logp.bfloat16(), self.old.bfloat16(), self.a.bfloat16(), self.mask).values():
            assert loss.dtype == torch.float32


X23, X3, X2 = torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)


def test_advantages_broadcast_along_tokens() -> None:
    a = torch.tensor([[1.0], [2.0]])
    assert torch.equal(reinforce(X23 - 1, a), a.expand(2, 3))
    assert clipped_surrogate(X23, X23, a, clip_low=0.2, clip_high=0.2).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reinforce(torch.zeros(3, 3), X3), r"logp \[3, 3\], advantages \[3\]"),
        (lambda: clipped_surrogate(X23, X2, X23, clip_low=0.2, clip_high=0.2), r"old_logp \[2\]"),
        (lambda: clipped_surrogate(X3, X3, X3, clip_low=-0.2, clip_high=0.2), "clip_low"),
        (lambda: clipped_surrogate(X3, X3, X3, clip_low=0.2, clip_high=math.nan), "clip_high"),
        (lambda: clipped_surrogate(X3, X3, X3, clip_low=0.2, clip_high=0.2, dual_clip=1.0), "dual_clip"),
        (lambda: sequence_clipped_surrogate(X23, X23, X3, X23, clip_low=0, clip_high=0), r"shape \[2\], got \[3\]"),
        (lambda: sequence_clipped_surrogate(X23, X23, X2, X3, clip_low=0, clip_high=0), r"mask \[3\]"),
        (lambda: clipped_is_reinforce(X3, X3, X3, clip_high=-1), "clip_high"),
        (lambda: soft_gated(X3, X3, X3, tau_positive=0), "tau_positive"),
        (lambda: importance_weights(X3, X3, X3, high=1), "dimension"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
