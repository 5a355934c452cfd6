"""Supervised and preference losses: rows 21, 25, 37, 38, 46 of the checklist, hand values and definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from upslope.functional.logprobs import log_softmax, token_logprobs
from upslope.functional.masking import masked_sum
from upslope.functional.supervised_losses import (
    bradley_terry,
    classification_policy_gradient,
    dft,
    divergence,
    dpo,
    ipo,
    kto,
    minimum_risk,
    nll,
    orpo,
    simpo,
    value_loss,
)

from . import definitions


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


logps = st.floats(-40, -1e-3)


class TestLikelihood:
    def test_hand_values(self) -> None:
        assert nll(f64(-1.5)).item() == 1.5
        assert nll(f64(-1.0), 0.1, f64(-3.0)).item() == pytest.approx(0.9 * 1 + 0.1 * 3)
        assert dft(f64(math.log(0.25))).item() == pytest.approx(0.25 * math.log(4))

    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
    def test_equals_cross_entropy_of_torch(self, smoothing: float) -> None:
        logits, tokens = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
        ours = nll(token_logprobs(logits, tokens), smoothing, log_softmax(logits).mean(-1))
        theirs = F.cross_entropy(logits, tokens, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(ours, theirs)

    def test_dft_gradient_is_likelihoods_times_p(self) -> None:
        logp = torch.tensor([-0.5, -3.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(dft(logp).sum(), logp)
        torch.testing.assert_close(gradient, -logp.detach().exp())

    def test_smoothing_needs_the_mean(self) -> None:
        with pytest.raises(ValueError, match="mean_logp"):
            nll(f64(-1.0), 0.1)
        with pytest.raises(ValueError, match="label_smoothing"):
            nll(f64(-1.0), 1.1, f64(-1.0))


def critic(v: float, target: float, old: float, clip: float) -> tuple[float, float]:
    value = torch.tensor([v], dtype=torch.float64, requires_grad=True)
    loss = value_loss(value, f64(target), old_values=f64(old), clip=clip)
    loss.sum().backward()
    assert value.grad is not None
    return loss.item(), value.grad.item()


class TestValueLoss:
    def test_half_the_squared_error(self) -> None:
        assert value_loss(f64(3.0), f64(1.0)).item() == 2.0

    @pytest.mark.parametrize(
        ("v", "target", "old", "loss", "gradient"),
        [
            (0.1, 1.0, 0.0, 0.5 * 0.81, -0.9),  # inside the clip
            (0.5, 1.0, 0.0, 0.5 * 0.64, 0.0),  # moved beyond it towards the target: limited
            (-0.5, 1.0, 0.0, 0.5 * 2.25, -1.5),  # moved away: full gradient back
            (1.5, 1.0, 0.0, 0.5 * 0.64, 0.0),  # past the target, nearer than the clipped value
            (3.0, 1.0, 0.0, 0.5 * 4.0, 2.0),  # past the target by more
            (-1.5, -1.0, 0.0, 0.5 * 0.64, 0.0),
        ],
    )
    def test_row25_branches(self, v: float, target: float, old: float, loss: float, gradient: float) -> None:
        assert critic(v, target, old, 0.2) == pytest.approx((loss, gradient))

    @given(*(st.floats(-5, 5) for _ in range(3)), st.floats(0.01, 2))
    @settings(deadline=None, max_examples=50)
    def test_row25_against_the_definition(self, v: float, target: float, old: float, clip: float) -> None:
        clipped = old + max(-clip, min(clip, v - old))
        assert critic(v, target, old, clip)[0] == pytest.approx(
            0.5 * max((v - target) ** 2, (clipped - target) ** 2), abs=1e-12
        )

    def test_row25_unmoved_values_are_not_clipped(self) -> None:
        v, target = torch.randn(9), torch.randn(9)
        assert torch.equal(value_loss(v, target, old_values=v, clip=0.2), value_loss(v, target))

    def test_row21_targets_are_constants(self) -> None:
        v, target, old = (torch.randn(3, requires_grad=True) for _ in range(3))
        value_loss(v, target, old_values=old, clip=0.2).sum().backward()
        assert v.grad is not None
        assert target.grad is None
        assert old.grad is None

    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    def test_row04_masked_junk(self, junk: float) -> None:
        mask = torch.tensor([1, 0, 1]).bool()
        v = torch.tensor([1.0, junk, 2.0], requires_grad=True)
        target = torch.tensor([0.0, junk, 0.0])
        for options in ({}, {"old_values": torch.tensor([0.0, junk, 2.0]), "clip": 0.2}):
            (gradient,) = torch.autograd.grad(masked_sum(value_loss(v, target, **options), mask), v)
            assert gradient.tolist() == [1.0, 0.0, 2.0]

    def test_wrong_options_are_refused(self) -> None:
        for options in ({"clip": 0.2}, {"old_values": f64(0.0)}, {"old_values": f64(0.0), "clip": 0.0}):
            with pytest.raises(ValueError, match="clip"):
                value_loss(f64(0.0), f64(0.0), **options)


class TestPreferences:
    """Row 37. h = (-3 + 4) - (-5 + 5.5) = 0.5 for the hand values."""

    four = (f64(-3.0), f64(-5.0), f64(-4.0), f64(-5.5))

    def test_row37_hand_values(self) -> None:
        assert dpo(*self.four, beta=0.1).item() == pytest.approx(-definitions.log_sigmoid(0.05))
        smooth = dpo(*self.four, beta=0.1, label_smoothing=0.2).item()
        assert smooth == pytest.approx(-0.8 * definitions.log_sigmoid(0.05) - 0.2 * definitions.log_sigmoid(-0.05))
        assert ipo(*self.four, beta=0.1).item() == pytest.approx((0.5 - 5) ** 2)
        assert dpo(*self.four[:2], *self.four[:2], beta=0.1).item() == pytest.approx(math.log(2))
        assert bradley_terry(f64(1.0), f64(0.0)).item() == pytest.approx(math.log(1 + math.exp(-1)))
        assert bradley_terry(f64(1.0), f64(0.0), 1.0, 0.01).item() == pytest.approx(math.log(2) + 0.01)
        assert bradley_terry(f64(1.0, 1.0), f64(0.0, 0.0), margin=f64(1.0, 0.0))[0].item() == pytest.approx(math.log(2))
        assert simpo(f64(-1.0), f64(-2.0), beta=2.0, margin=1.5).item() == pytest.approx(-definitions.log_sigmoid(0.5))

    @given(logps, logps, logps, logps, st.floats(0.01, 2), st.floats(0, 0.5))
    @settings(deadline=None, max_examples=50)
    def test_row37_against_the_definitions(
        self, c: float, r: float, rc: float, rr: float, beta: float, e: float
    ) -> None:
        h = (c - rc) - (r - rr)
        oracle = -(1 - e) * definitions.log_sigmoid(beta * h) - e * definitions.log_sigmoid(-beta * h)
        four = (f64(c), f64(r), f64(rc), f64(rr))
        assert dpo(*four, beta=beta, label_smoothing=e).item() == pytest.approx(oracle, abs=1e-9)
        assert ipo(*four, beta=beta).item() == pytest.approx((h - 1 / (2 * beta)) ** 2, rel=1e-9)

    def test_row37_swapping_chosen_and_rejected_flips_the_margin(self) -> None:
        c, r, rc, rr = self.four
        swapped = dpo(r, c, rr, rc, beta=0.1).item()
        assert swapped == pytest.approx(-definitions.log_sigmoid(-0.05))
        assert ipo(r, c, rr, rc, beta=0.1).item() == pytest.approx((-0.5 - 5) ** 2)

    def test_bradley_terry_does_not_see_a_shift_but_centering_does(self) -> None:
        c, r = torch.randn(2, 5, dtype=torch.float64)
        torch.testing.assert_close(bradley_terry(c + 3, r + 3), bradley_terry(c, r))
        assert not torch.allclose(bradley_terry(c + 3, r + 3, centering=0.01), bradley_terry(c, r, centering=0.01))

    def test_row21_the_reference_is_a_constant(self) -> None:
        four = [torch.randn(3, requires_grad=True) for _ in range(4)]
        (dpo(*four, beta=0.1) + ipo(*four, beta=0.1)).sum().backward()
        assert [x.grad is None for x in four] == [False, False, True, True]

    def test_row38_extreme_margins_stay_finite(self) -> None:
        for x in (1e4, -1e4):
            big, zero = torch.tensor([x], requires_grad=True), torch.zeros(1)
            for loss in (
                dpo(big, zero, zero, zero, beta=1.0, label_smoothing=0.1),
                bradley_terry(big, zero),
                simpo(big, zero, beta=1.0, margin=0.5),
                kto(big, zero, torch.ones(1), 0.0, beta=1.0),
            ):
                (gradient,) = torch.autograd.grad(loss.sum(), big)
                assert loss.isfinite().all()
                assert gradient.isfinite().all()

    @pytest.mark.parametrize("e", [-0.1, 0.6])
    def test_wrong_label_smoothing_is_refused(self, e: float) -> None:
        with pytest.raises(ValueError, match="label_smoothing"):
            dpo(*self.four, beta=0.1, label_smoothing=e)

    @pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
    def test_wrong_beta_is_refused(self, beta: float) -> None:
        one = f64(-1.0)
        for call in (
            lambda: dpo(*self.four, beta=beta),
            lambda: ipo(*self.four, beta=beta),
            lambda: simpo(one, one, beta=beta, margin=0.0),
            lambda: kto(one, one, torch.ones(1), 0.0, beta=beta),
        ):
            with pytest.raises(ValueError, match="beta"):
                call()

    def test_shapes_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"ref_chosen_logp \[2\]"):
            dpo(f64(1.0), f64(1.0), f64(1.0, 2.0), f64(1.0), beta=0.1)


class TestKTO:
    def test_row37_hand_values(self) -> None:
        """h = (1, 1), z = 0.5, beta 2: sigmoid(2 * 0.5) = 0.731."""
        loss = kto(f64(-1.0, -1.0), f64(-2.0, -2.0), torch.tensor([1, 0]), 0.5, beta=2.0, undesirable_weight=3.0)
        assert loss.tolist() == pytest.approx([1 - definitions.sigmoid(1.0), 3 * (1 - definitions.sigmoid(-1.0))])

    def test_row37_kl_is_a_constant_and_not_negative(self) -> None:
        logp, kl = torch.zeros(2, requires_grad=True), torch.tensor(-4.0, requires_grad=True)
        loss = kto(logp, torch.zeros(2), torch.tensor([True, False]), kl, beta=0.1)
        assert loss.tolist() == [0.5, 0.5]
        loss.sum().backward()
        assert kl.grad is None

    def test_wrong_shapes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="mask"):
            kto(f64(1.0), f64(1.0), torch.ones(2), 0.0, beta=0.1)
        with pytest.raises(ValueError, match=r"kl must be a number"):
            kto(f64(1.0), f64(1.0), torch.ones(1), f64(0.0, 0.0), beta=0.1)


class TestORPO:
    @given(st.floats(-30, -1e-6), st.floats(-30, -1e-6), st.floats(0, 2))
    @settings(deadline=None, max_examples=50)
    def test_row37_against_the_definition(self, c: float, r: float, lam: float) -> None:
        def log_odds(x: float) -> float:
            return x - math.log(-math.expm1(x))

        oracle = -c - lam * definitions.log_sigmoid(log_odds(c) - log_odds(r))
        assert orpo(f64(c), f64(r), lam=lam).item() == pytest.approx(oracle, rel=1e-9)

    def test_row37_hand_value(self) -> None:
        """P = 1/2 and 1/5: odds 1 and 1/4, so sigmoid(log 4) = 0.8."""
        loss = orpo(f64(0.5).log(), f64(0.2).log(), lam=0.1)
        assert loss.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.8))

    @pytest.mark.parametrize("x", [0.0, -1e-30, -1e-8, -1e4])
    def test_row38_stable_at_both_ends(self, x: float) -> None:
        c = torch.tensor([x], requires_grad=True)
        loss = orpo(c, torch.tensor([-1.0]), lam=1.0)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert c.grad is not None
        assert c.grad.isfinite().all()

    def test_a_sum_above_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="mean log-prob"):
            orpo(f64(0.1), f64(-1.0), lam=0.1)


class TestMinimumRisk:
    def test_hand_values(self) -> None:
        """P = (1/2, 1/4), alpha 1: Q = (2/3, 1/3)."""
        logp, costs = f64(0.5, 0.25).log().unsqueeze(0), f64(0.0, 3.0).unsqueeze(0)
        assert minimum_risk(logp, costs, alpha=1.0).tolist() == pytest.approx([1.0])
        assert minimum_risk(logp, costs, alpha=1e-9).tolist() == pytest.approx([1.5])

    def test_row46_gradient_is_alpha_q_times_centred_cost(self) -> None:
        logp = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        costs = torch.randn(3, 5, dtype=torch.float64)
        loss = minimum_risk(logp, costs, alpha=0.3)
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        q = torch.softmax(0.3 * logp, 1)
        torch.testing.assert_close(gradient, 0.3 * q * (costs - (q * costs).sum(1, keepdim=True)))

    def test_row46_one_element_has_gradient_zero(self) -> None:
        logp = torch.tensor([[-3.0]], requires_grad=True)
        loss = minimum_risk(logp, torch.tensor([[2.0]]), alpha=0.005)
        assert loss.tolist() == [2.0]
        assert torch.autograd.grad(loss.sum(), logp)[0].tolist() == [[0.0]]

    def test_row46_masked_duplicates_change_nothing(self) -> None:
        logp, costs = torch.randn(1, 3), torch.randn(1, 3)
        doubled, mask = torch.cat([logp, logp], 1), torch.tensor([[1, 1, 1, 0, 0, 0]])
        masked = minimum_risk(doubled, torch.cat([costs, costs], 1), mask, alpha=1.0)
        torch.testing.assert_close(masked, minimum_risk(logp, costs, alpha=1.0))

    def test_row04_masked_junk_and_empty_groups(self) -> None:
        logp = torch.tensor([[-1.0, math.nan], [math.nan, math.inf]], requires_grad=True)
        costs = torch.tensor([[1.0, math.nan], [math.nan, math.nan]])
        loss = minimum_risk(logp, costs, torch.tensor([[1, 0], [0, 0]]), alpha=1.0)
        assert loss.tolist() == [1.0, 0.0]
        (gradient,) = torch.autograd.grad(loss.sum(), logp)
        assert (gradient == 0).all()

    def test_wrong_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="alpha"):
            minimum_risk(torch.zeros(1, 2), torch.zeros(1, 2), alpha=0.0)
        with pytest.raises(ValueError, match=r"costs_PG \[2, 1\]"):
            minimum_risk(torch.zeros(1, 2), torch.zeros(2, 1), alpha=1.0)


class TestDivergence:
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def test_against_the_definition(self) -> None:
        rows = list(zip(self.student.tolist(), self.teacher.tolist(), strict=True))
        forward = f64(*(definitions.kl(t, s) for s, t in rows))
        reverse = f64(*(definitions.kl(s, t) for s, t in rows))
        torch.testing.assert_close(divergence(self.student, self.teacher), forward)
        torch.testing.assert_close(divergence(self.student, self.teacher, kind="reverse"), reverse)

        def jsd(s: list[float], t: list[float], w: float) -> float:
            p = [math.exp(x) for x in definitions.log_softmax(t)]
            q = [math.exp(x) for x in definitions.log_softmax(s)]
            m = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
            return sum(w * a * math.log(a / c) + (1 - w) * b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True))

        for w in (0.1, 0.5, 0.9):
            oracle = f64(*(jsd(s, t, w) for s, t in rows))
            torch.testing.assert_close(divergence(self.student, self.teacher, kind="jsd", weight=w), oracle)

    def test_limits_of_the_jsd_are_the_two_kls(self) -> None:
        s, t = self.student, self.teacher
        torch.testing.assert_close(
            divergence(s, t, kind="jsd", weight=1e-7) / 1e-7, divergence(s, t), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            divergence(s, t, kind="jsd", weight=1 - 1e-7) / 1e-7, divergence(s, t, kind="reverse"), rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(divergence(s, t, kind="jsd"), divergence(t, s, kind="jsd"))

    @pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
    def test_zero_on_equal_gradient_and_constant_teacher(self, kind) -> None:
        assert divergence(self.student, self.student.clone(), kind=kind).abs().max() < 1e-14
        student, teacher = self.student.clone().requires_grad_(), self.teacher.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: divergence(x, self.teacher, kind=kind), (student,))
        divergence(student, teacher, kind=kind).sum().backward()
        assert teacher.grad is None

    @pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
    def test_row04_a_nan_row_and_banned_tokens(self, kind) -> None:
        student, teacher = self.student.clone(), self.teacher.clone()
        student[1], teacher[2] = math.nan, math.nan
        student[:, 0] = teacher[:, 0] = -math.inf
        student.requires_grad_()
        value = divergence(student, teacher, kind=kind)
        assert value.isnan().tolist() == [False, True, True, False]
        (gradient,) = torch.autograd.grad(masked_sum(value, torch.tensor([1, 0, 0, 1])), student)
        assert gradient.isfinite().all()

    def test_wrong_arguments_are_refused(self) -> None:
        with pytest.raises(ValueError, match="'both'"):
            divergence(self.student, self.teacher, kind="both")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="weight"):
            divergence(self.student, self.teacher, kind="jsd", weight=1.0)
        with pytest.raises(ValueError, match=r"\[4, 6\].*\[4, 5\]"):
            divergence(self.student, self.teacher[:, :5])


class TestClassification:
    def test_closed_form_of_the_gradient(self) -> None:
        z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        r = torch.randn(4, 3, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(classification_policy_gradient(z, r).sum(), z)
        p = torch.softmax(z, -1)
        torch.testing.assert_close(gradient, -p * (r - (p * r).sum(-1, keepdim=True)))

    def test_with_a_0_1_reward_it_is_cross_entropys_gradient_times_p(self) -> None:
        z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        label = torch.tensor([0, 2, 1, 1])
        (ours,) = torch.autograd.grad(classification_policy_gradient(z, F.one_hot(label, 3)).sum(), z)
        (theirs,) = torch.autograd.grad(F.cross_entropy(z, label, reduction="sum"), z)
        torch.testing.assert_close(ours, theirs * torch.softmax(z, -1).gather(1, label[:, None]))

    def test_hand_value_and_shapes(self) -> None:
        assert classification_policy_gradient(torch.zeros(1, 2), torch.tensor([[4, 0]])).tolist() == [-2.0]
        with pytest.raises(ValueError, match="logits"):
            classification_policy_gradient(torch.zeros(2, 3), torch.zeros(2, 4))

    def test_one_logit_for_two_classes_learns_nothing(self) -> None:
        """The slip of a source text: the same score for both classes is probability 1/2 and gradient 0."""
        score = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)
        loss = classification_policy_gradient(score.expand(5, 2), torch.tensor([[1.0, 0.0]]).double().expand(5, 2))
        assert loss.tolist() == [-0.5] * 5
        assert torch.autograd.grad(loss.sum(), score)[0].abs().max() < 1e-15
