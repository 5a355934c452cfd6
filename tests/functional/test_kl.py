"""KL estimators: values, the gradient of each in the loss and in the reward (row 22), and the controller (row 23)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from upslope.functional import kl
from upslope.functional.masking import masked_sum
from upslope.functional.policy_losses import reinforce
from upslope.functional.returns import discounted_returns

from . import definitions
from .enumerable import EnumerableLM

TOL = {"rtol": 0.0, "atol": 1e-12}
ESTIMATORS = [kl.k1, kl.k2, kl.k3, kl.importance_k1]


@pytest.fixture(params=[(3, 3), (5, 4)], ids=lambda p: f"V{p[0]}T{p[1]}")
def lm(request: pytest.FixtureRequest) -> EnumerableLM:
    return EnumerableLM(*request.param)


def sequence_kl(lm: EnumerableLM) -> Tensor:
    """KL(pi || ref) over whole sequences."""
    return (lm.logp_S().exp() * (lm.logp_S() - lm.logp_S(lm.reference()))).sum()


def forward_sequence_kl(lm: EnumerableLM) -> Tensor:
    """KL(ref || pi) over whole sequences."""
    ref = lm.logp_S(lm.reference())
    return (ref.exp() * (ref - lm.logp_S())).sum()


def per_state(lm: EnumerableLM, *, reverse: bool) -> Tensor:
    """sum over states of (probability to be there, held constant) * KL of the next-token distributions."""
    visits = torch.zeros(len(lm.prefixes), dtype=torch.float64)
    for s, sequence in enumerate(lm.sequences):
        for t in range(len(sequence)):
            visits[lm.prefixes[sequence[:t]]] += lm.probabilities()[s]
    log_pi, log_ref = torch.log_softmax(lm.logits, -1), torch.log_softmax(lm.reference(), -1)
    p, q = (log_pi, log_ref) if reverse else (log_ref, log_pi)
    return (visits * (p.exp() * (p - q)).sum(-1)).sum()


def token_sum(lm: EnumerableLM, estimate_ST: Tensor) -> Tensor:
    return masked_sum(estimate_ST, lm.mask_ST, dim=1)


def test_hand_constants() -> None:
    logp, ref = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl.k1(logp, ref).item() == pytest.approx(math.log(2))
    assert kl.k2(logp, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.k3(logp, ref).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert kl.importance_k1(logp, ref).item() == pytest.approx(math.log(2))
    assert kl.importance_k1(logp, ref, torch.tensor([math.log(0.25)])).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_kl_exactly_zero(estimator) -> None:
    logp = torch.randn(50)
    assert torch.equal(estimator(logp, logp.clone()), torch.zeros(50))


def test_row22_expected_values(lm: EnumerableLM) -> None:
    new, ref = lm.logp_ST(), lm.logp_ST(lm.reference())
    p = lm.probabilities()
    exact = sequence_kl(lm)
    for unbiased in (kl.k1, kl.k3, kl.importance_k1):
        torch.testing.assert_close((p * token_sum(lm, unbiased(new, ref))).sum(), exact, **TOL)
    assert ((p * token_sum(lm, kl.k2(new, ref))).sum() - exact).abs() > 1e-2


def test_row22_gradients_as_a_loss_per_token(lm: EnumerableLM) -> None:
    new, ref = lm.logp_ST(), lm.logp_ST(lm.reference())

    def expected(estimator) -> Tensor:
        return lm.expected_gradient(token_sum(lm, estimator(new, ref)))

    reverse, forward = lm.gradient(per_state(lm, reverse=True)), lm.gradient(per_state(lm, reverse=False))
    assert expected(kl.k1).abs().max() < 1e-12
    torch.testing.assert_close(expected(kl.k2), reverse, **TOL)
    torch.testing.assert_close(expected(kl.k3), forward, **TOL)
    torch.testing.assert_close(expected(kl.importance_k1), reverse, **TOL)
    # none of them is the gradient of the KL of sequences: later tokens' KL is left out
    assert (reverse - lm.gradient(sequence_kl(lm))).abs().max() > 1e-3


def test_row22_gradients_as_a_loss_on_whole_sequences(lm: EnumerableLM) -> None:
    new, ref = lm.logp_S(), lm.logp_S(lm.reference())
    reverse, forward = lm.gradient(sequence_kl(lm)), lm.gradient(forward_sequence_kl(lm))
    assert lm.expected_gradient(kl.k1(new, ref)).abs().max() < 1e-12
    torch.testing.assert_close(lm.expected_gradient(kl.k2(new, ref)), reverse, **TOL)
    torch.testing.assert_close(lm.expected_gradient(kl.k3(new, ref)), forward, **TOL)
    torch.testing.assert_close(lm.expected_gradient(kl.importance_k1(new, ref)), reverse, **TOL)


def test_row22_gradients_in_the_reward(lm: EnumerableLM) -> None:
    new, ref = lm.logp_ST(), lm.logp_ST(lm.reference())
    exact = lm.gradient(sequence_kl(lm))
    # k1 with returns to go: the exact gradient of the sequences' KL
    to_go = discounted_returns(kl.k1(new, ref).detach(), lm.mask_ST, gamma=1.0)
    gradient = -lm.expected_gradient(token_sum(lm, reinforce(new, to_go)))
    torch.testing.assert_close(gradient, exact, **TOL)
    # k3 subtracts the forward KL's gradient
    whole = -lm.expected_gradient(reinforce(lm.logp_S(), kl.k3(lm.logp_S(), lm.logp_S(lm.reference()))))
    torch.testing.assert_close(whole, exact - lm.gradient(forward_sequence_kl(lm)), **TOL)


def test_row22_importance_weighted_forms_off_policy(lm: EnumerableLM) -> None:
    """Samples of an older policy: rho * k1 is exact for whole sequences; rho * k2 is wrong."""
    old_table = lm.logits.detach() + 0.3 * lm.reference(7)
    new, ref, old = lm.logp_S(), lm.logp_S(lm.reference()), lm.logp_S(old_table)
    exact, sampled = lm.gradient(sequence_kl(lm)), old.exp()
    torch.testing.assert_close(lm.gradient((sampled * kl.importance_k1(new, ref, old)).sum()), exact, **TOL)
    ratio = (new - old).exp()
    torch.testing.assert_close(lm.gradient((sampled * ratio * kl.k3(new, ref)).sum()), exact, **TOL)
    assert (lm.gradient((sampled * ratio * kl.k2(new, ref)).sum()) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_row21_no_gradient_into_the_reference(estimator) -> None:
    logp, ref = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    estimator(logp, ref).sum().backward()
    assert ref.grad is None
    assert logp.grad is not None


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e9, -1e9])
def test_row04_masked_junk_changes_neither_value_nor_gradient(estimator, junk: float) -> None:
    logp, ref = torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()

    def run(logp: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logp.clone().requires_grad_()
        value = masked_sum(estimator(leaf, ref), mask)
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    clean = run(logp, ref)
    for dirty in (run(logp, ref.masked_fill(~mask, junk)), run(logp.masked_fill(~mask, junk), ref)):
        assert torch.equal(dirty[0], clean[0])
        assert torch.equal(dirty[1], clean[1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_unmasked_nan_stays_visible(estimator) -> None:
    assert estimator(torch.tensor([0.0, math.nan]), torch.zeros(2))[1].isnan()


def test_row38_k3_keeps_its_digits_near_zero() -> None:
    logp = torch.tensor([-1.0], dtype=torch.float64)
    for d in (1e-3, 1e-6, 1e-8):
        assert kl.k3(logp + d, logp).item() == pytest.approx(d * d / 2, rel=1e-2, abs=1e-16)
    assert kl.k3(torch.tensor([-1e4]), torch.tensor([0.0])).isinf().all()


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=8))
def test_k3_is_never_negative(pairs: list[tuple[float, float]]) -> None:
    logp, ref = torch.tensor(pairs, dtype=torch.float64).T
    assert (kl.k3(logp, ref) >= 0).all()


class TestCategorical:
    def test_against_the_definition_and_torch(self) -> None:
        p, q = torch.randn(2, 6, 5, dtype=torch.float64)
        value = kl.categorical_kl(p, q)
        oracle = [definitions.kl(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
        torch.testing.assert_close(value, torch.tensor(oracle, dtype=torch.float64), **TOL)
        torch.testing.assert_close(value, kl_divergence(Categorical(logits=p), Categorical(logits=q)), **TOL)

    def test_direction(self) -> None:
        """KL(p || q) with p = (1/2, 1/2), q = (1/4, 3/4): log 2 / 2 + log(2/3) / 2."""
        p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        assert kl.categorical_kl(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))

    def test_zero_probabilities(self) -> None:
        p = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)
        value = kl.categorical_kl(p, torch.zeros(3))
        value.backward()
        assert value.item() == pytest.approx(math.log(3 / 2))
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert kl.categorical_kl(torch.zeros(3), torch.tensor([0.0, -math.inf, 0.0])).isinf()

    def test_gradient(self) -> None:
        p, q = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(kl.categorical_kl, (p, q))

    def test_row04_a_nan_row_does_not_reach_the_others(self) -> None:
        p, q = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
        q[1] = math.nan
        value = kl.categorical_kl(p, q)
        assert value.isnan().tolist() == [False, True, False]
        masked_sum(value, torch.tensor([1, 0, 1])).backward()
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert (p.grad[1] == 0).all()


class TestAdaptiveKL:
    def test_row23_hand_constants(self) -> None:
        controller = kl.AdaptiveKL(0.2, target=6.0, horizon=10_000)
        assert controller.update(12.0, 64) == pytest.approx(0.2 * 1.00128, rel=1e-12)
        assert controller.coef == pytest.approx(0.2 * 1.00128, rel=1e-12)

    @pytest.mark.parametrize(
        ("measured", "factor"), [(6.0, 1.0), (6.6, 1.00064), (0.0, 0.99872), (5.4, 0.99936), (-3.0, 0.99872)]
    )
    def test_row23_clip_on_both_sides(self, measured: float, factor: float) -> None:
        assert kl.AdaptiveKL(1.0, 6.0, 10_000).update(torch.tensor(measured), 64) == pytest.approx(factor, rel=1e-7)

    def test_state_round_trip(self) -> None:
        a, b = kl.AdaptiveKL(0.1, 3.0, 500), kl.AdaptiveKL(0.7, 3.0, 500)
        a.update(9.0, 32)
        b.load_state_dict(a.state_dict())
        assert a.update(1.0, 8) == b.update(1.0, 8)

    @pytest.mark.parametrize("bad", [{}, {"coef": 0.1, "x": 1.0}, {"coef": 0.0}, {"coef": math.nan}])
    def test_a_wrong_state_is_refused(self, bad: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="coef"):
            kl.AdaptiveKL(0.1, 3.0, 500).load_state_dict(bad)

    @pytest.mark.parametrize(("measured", "n"), [(math.nan, 4), (math.inf, 4), (1.0, 0), (0.0, 10_000)])
    def test_wrong_measurements_are_refused(self, measured: float, n: int) -> None:
        controller = kl.AdaptiveKL(0.1, 3.0, 500)
        with pytest.raises(ValueError, match=r"kl|n must|horizon"):
            controller.update(measured, n)
        assert controller.coef == 0.1

    @given(st.floats(1e-3, 10), st.lists(st.floats(-5, 100), max_size=20))
    def test_the_coefficient_stays_positive(self, coef: float, measured: list[float]) -> None:
        controller = kl.AdaptiveKL(coef, 2.0, 100)
        for value in measured:
            before = controller.coef
            after = controller.update(value, 100)
            assert after > 0
            assert (after > before) == (value > 2.0) or after == before


def test_shapes_are_checked_and_printed() -> None:
    with pytest.raises(ValueError, match=r"logp \[3\], ref_logp \[2, 3\]"):
        kl.k1(torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[2, 3\], \[2, 4\]"):
        kl.categorical_kl(torch.zeros(2, 3), torch.zeros(2, 4))


def test_rollout_kl_by_hand() -> None:
    """Ratio 2: 2 - 1 - log 2; ratio 1/2: 1/2 - 1 + log 2; equal: 0."""
    logp = torch.tensor([math.log(0.6), math.log(0.2), -1.0], dtype=torch.float64)
    old = torch.tensor([math.log(0.3), math.log(0.4), -1.0], dtype=torch.float64)
    expected = torch.tensor([1 - math.log(2), -0.5 + math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(kl.rollout_kl(logp, old), expected, **TOL)
    assert torch.equal(kl.rollout_kl(logp, old), kl.k3(old, logp))


def test_rollout_kl_has_the_gradient_of_kl_from_the_sampling_policy() -> None:
    """E over pi_old of the estimator's gradient is the gradient of KL(pi_old || pi), for one state in float64."""
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    new.requires_grad_()
    exact = (old.softmax(0) * (old.log_softmax(0) - new.log_softmax(0))).sum()
    estimated = (old.softmax(0) * kl.rollout_kl(new.log_softmax(0), old.log_softmax(0))).sum()
    torch.testing.assert_close(estimated, exact, **TOL)
    (a,), (b,) = torch.autograd.grad(estimated, new), torch.autograd.grad(exact, new)
    torch.testing.assert_close(a, b, **TOL)


def test_rollout_kl_keeps_nan_to_itself() -> None:
    logp = torch.tensor([-1.0, math.nan, -2.0], requires_grad=True)
    old = torch.tensor([-1.5, -1.0, math.nan])
    loss = kl.rollout_kl(logp, old)
    assert loss.isnan().tolist() == [False, True, True]
    masked_sum(loss, torch.tensor([True, False, False])).backward()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
    assert logp.grad[1:].tolist() == [0.0, 0.0]
