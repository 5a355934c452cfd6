"""Row 1 of the checklist: every estimator's expectation, by enumeration, against autograd of the exact objective."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from upslope.functional.advantages import group_centered, group_normalized, leave_one_out
from upslope.functional.masking import masked_sum
from upslope.functional.policy_losses import (
    clipped_is_reinforce,
    clipped_surrogate,
    importance_weights,
    reinforce,
    sequence_clipped_surrogate,
    soft_gated,
)
from upslope.functional.returns import discounted_returns, gae, lambda_returns, n_step_advantages, vtrace
from upslope.functional.supervised_losses import classification_policy_gradient, minimum_risk

from .enumerable import EnumerableLM

TOL = {"rtol": 0.0, "atol": 1e-12}
MODELS = [(2, 2), (3, 3), (5, 4)]


@pytest.fixture(params=MODELS, ids=lambda p: f"V{p[0]}T{p[1]}")
def lm(request: pytest.FixtureRequest) -> EnumerableLM:
    return EnumerableLM(*request.param, seed=sum(request.param))


def discounts(lm: EnumerableLM, gamma: float) -> Tensor:
    return gamma ** torch.arange(lm.length, dtype=torch.float64)


def sequence_loss(lm: EnumerableLM, loss_ST: Tensor) -> Tensor:
    return masked_sum(loss_ST, lm.mask_ST, dim=1)


def test_the_enumeration_is_complete(lm: EnumerableLM) -> None:
    assert abs(float(lm.probabilities().sum()) - 1) < 1e-12
    assert {len(s) for s in lm.sequences} == set(range(1, lm.length + 1))


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_row01_reinforce_without_baseline_is_unbiased(lm: EnumerableLM, gamma: float) -> None:
    # gamma^t in front of step t belongs to the gradient of the discounted objective; usual code omits it
    returns = discounted_returns(lm.rewards_ST, lm.mask_ST, gamma=gamma)
    loss = reinforce(lm.logp_ST(), returns) * discounts(lm, gamma)
    exact = -lm.gradient(lm.objective(gamma))
    torch.testing.assert_close(lm.expected_gradient(sequence_loss(lm, loss)), exact, **TOL)


def test_row01_omitting_gamma_to_the_t_is_biased() -> None:
    lm = EnumerableLM(3, 3)
    returns = discounted_returns(lm.rewards_ST, lm.mask_ST, gamma=0.7)
    biased = lm.expected_gradient(sequence_loss(lm, reinforce(lm.logp_ST(), returns)))
    assert (biased + lm.gradient(lm.objective(0.7))).abs().max() > 1e-3


def test_row02_reward_to_go_and_total_reward_agree_in_expectation_only(lm: EnumerableLM) -> None:
    to_go = reinforce(lm.logp_ST(), discounted_returns(lm.rewards_ST, lm.mask_ST, gamma=1.0))
    total = reinforce(lm.logp_ST(), lm.total_rewards().unsqueeze(1))
    torch.testing.assert_close(
        lm.expected_gradient(sequence_loss(lm, to_go)), lm.expected_gradient(sequence_loss(lm, total)), **TOL
    )
    assert not torch.allclose(sequence_loss(lm, to_go), sequence_loss(lm, total))


def test_row01_reinforce_with_any_state_baseline_is_unbiased(lm: EnumerableLM) -> None:
    baseline = torch.randn(len(lm.prefixes), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    returns = discounted_returns(lm.rewards_ST, lm.mask_ST, gamma=1.0)
    loss = reinforce(lm.logp_ST(), returns - baseline[lm.rows_ST])
    torch.testing.assert_close(lm.expected_gradient(sequence_loss(lm, loss)), -lm.gradient(lm.objective()), **TOL)


def test_a_baseline_that_sees_the_action_is_biased() -> None:
    lm = EnumerableLM(3, 3)
    returns = discounted_returns(lm.rewards_ST, lm.mask_ST, gamma=1.0)
    loss = reinforce(lm.logp_ST(), returns - lm.tokens_ST)
    assert (lm.expected_gradient(sequence_loss(lm, loss)) + lm.gradient(lm.objective())).abs().max() > 1e-2


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_row01_actor_critic_with_the_true_value_is_unbiased_for_every_lambda(
    lm: EnumerableLM, gamma: float, lam: float
) -> None:
    advantages = gae(lm.rewards_ST, lm.true_values(gamma), lm.mask_ST, gamma=gamma, lam=lam)
    loss = reinforce(lm.logp_ST(), advantages) * discounts(lm, gamma)
    exact = -lm.gradient(lm.objective(gamma))
    torch.testing.assert_close(lm.expected_gradient(sequence_loss(lm, loss)), exact, **TOL)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_row01_n_step_actor_critic_with_the_true_value_is_unbiased(lm: EnumerableLM, n: int) -> None:
    advantages = n_step_advantages(lm.rewards_ST, lm.true_values(), lm.mask_ST, gamma=1.0, n=n)
    loss = reinforce(lm.logp_ST(), advantages)
    torch.testing.assert_close(lm.expected_gradient(sequence_loss(lm, loss)), -lm.gradient(lm.objective()), **TOL)


def test_a_wrong_critic_biases_lambda_below_one_but_not_lambda_one() -> None:
    lm = EnumerableLM(3, 3)
    wrong = lm.true_values() + torch.randn(lm.rows_ST.shape, dtype=torch.float64)[0].abs() + lm.rows_ST
    errors = []
    for lam in (1.0, 0.5, 0.0):
        loss = reinforce(lm.logp_ST(), gae(lm.rewards_ST, wrong, lm.mask_ST, gamma=1.0, lam=lam))
        gradient = lm.expected_gradient(sequence_loss(lm, loss))
        errors.append(float((gradient + lm.gradient(lm.objective())).abs().max()))
    assert errors[0] < 1e-12 < 1e-2 < errors[1] < errors[2]


def test_the_true_value_predicts_no_better_or_worse_than_itself(lm: EnumerableLM) -> None:
    """With the true V, E[A] = 0 at every state: advantages cannot rank models."""
    values = lm.true_values()
    for lam in (0.0, 0.6, 1.0):
        first = gae(lm.rewards_ST, values, lm.mask_ST, gamma=1.0, lam=lam)[:, 0]
        assert abs(float((lm.probabilities() * first).sum())) < 1e-12
    targets = lambda_returns(lm.rewards_ST, values, lm.mask_ST, gamma=1.0, lam=0.6)[:, 0]
    assert abs(float((lm.probabilities() * targets).sum() - values[0, 0])) < 1e-12


def test_row01_row13_every_ratio_loss_has_reinforces_gradient_at_ratio_one(lm: EnumerableLM) -> None:
    advantages = gae(lm.rewards_ST, lm.true_values(), lm.mask_ST, gamma=1.0, lam=0.9)
    exact = -lm.gradient(lm.objective())
    new, old = lm.logp_ST(), lm.logp_ST().detach()
    losses = {
        "ppo": clipped_surrogate(new, old, advantages, clip_low=0.2, clip_high=0.2),
        "ppo dual": clipped_surrogate(new, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
        "cispo": clipped_is_reinforce(new, old, advantages, clip_high=0.28),
        "sapo": soft_gated(new, old, advantages),
    }
    for name, loss in losses.items():
        gradient = lm.expected_gradient(sequence_loss(lm, loss))
        torch.testing.assert_close(gradient, exact, **TOL, msg=name)


def test_row01_gspo_at_ratio_one_is_length_normalised_reinforce(lm: EnumerableLM) -> None:
    rewards = lm.total_rewards()
    new = lm.logp_ST()
    loss = sequence_clipped_surrogate(new, new.detach(), rewards, lm.mask_ST, clip_low=3e-4, clip_high=4e-4)
    lengths = lm.mask_ST.sum(1)
    exact = -lm.gradient((lm.probabilities() * rewards / lengths * lm.logp_S()).sum())
    torch.testing.assert_close(lm.expected_gradient(loss), exact, **TOL)


def test_row17_the_end_of_sequence_token_carries_gradient(lm: EnumerableLM) -> None:
    """Without EOS in the mask the estimator is biased: whether to stop is a choice like any other."""
    without_eos = lm.mask_ST & (lm.tokens_ST != 0)
    loss = masked_sum(reinforce(lm.logp_ST(), lm.total_rewards().unsqueeze(1)), without_eos, dim=1)
    assert (lm.expected_gradient(loss) + lm.gradient(lm.objective())).abs().max() > 1e-3


@pytest.mark.parametrize(("vocabulary", "length", "G"), [(2, 2, 2), (2, 2, 4), (3, 2, 3), (5, 4, 2), (2, 3, 5)])
def test_row01_leave_one_out_is_unbiased_over_all_tuples(vocabulary: int, length: int, G: int) -> None:
    lm = EnumerableLM(vocabulary, length, seed=G)
    tuples = torch.tensor(list(itertools.product(range(len(lm.sequences)), repeat=G)))
    weight = lm.probabilities()[tuples].prod(1)
    rewards = lm.total_rewards()[tuples]
    exact = -lm.gradient(lm.objective())

    def expected(advantages_PG: Tensor) -> Tensor:
        loss = reinforce(lm.logp_S()[tuples], advantages_PG).mean(1)
        return lm.gradient((weight * loss).sum())

    torch.testing.assert_close(expected(leave_one_out(rewards)), exact, **TOL)
    # centring with the own sample shrinks the gradient by (G - 1) / G and does not turn it
    torch.testing.assert_close(expected(group_centered(rewards)), exact * (G - 1) / G, **TOL)


def test_dividing_by_the_group_std_changes_the_objective() -> None:
    lm = EnumerableLM(2, 2)
    tuples = torch.tensor(list(itertools.product(range(len(lm.sequences)), repeat=3)))
    weight = lm.probabilities()[tuples].prod(1)
    advantages = group_normalized(lm.total_rewards()[tuples])
    gradient = lm.gradient((weight * reinforce(lm.logp_S()[tuples], advantages).mean(1)).sum()).flatten()
    exact = -lm.gradient(lm.objective()).flatten()
    cosine = torch.nn.functional.cosine_similarity(gradient, exact, dim=0)
    assert 0.5 < cosine < 1 - 1e-6


def test_row01_remax_greedy_baseline_is_unbiased(lm: EnumerableLM) -> None:
    """SCST / ReMax: the reward of the greedy completion does not depend on the sample."""
    greedy: tuple[int, ...] = ()
    while greedy not in lm.sequences:
        greedy = (*greedy, int(lm.logits[lm.prefixes[greedy]].argmax()))
    baseline = lm.total_rewards()[lm.sequences.index(greedy)]
    loss = reinforce(lm.logp_S(), lm.total_rewards() - baseline)
    torch.testing.assert_close(lm.expected_gradient(loss), -lm.gradient(lm.objective()), **TOL)


def test_row33_sequence_importance_weights_are_unbiased(lm: EnumerableLM) -> None:
    """Samples from another policy, corrected by the untruncated product, give the policy's own gradient."""
    behaviour = lm.logp_ST(lm.reference())
    weights = importance_weights(lm.logp_ST(), behaviour, lm.mask_ST, level="sequence", mode="truncate", high=1e300)
    loss = reinforce(lm.logp_ST(), lm.total_rewards().unsqueeze(1)) * weights
    sampled = lm.logp_S(lm.reference()).exp()
    gradient = lm.gradient((sampled * sequence_loss(lm, loss)).sum())
    torch.testing.assert_close(gradient, -lm.gradient(lm.objective()), **TOL)


def test_vtrace_targets_are_unbiased_off_policy_without_clipping(lm: EnumerableLM) -> None:
    """With unclipped ratios v_0 is an unbiased estimate of V of the target policy under samples of the other."""
    behaviour = lm.logp_ST(lm.reference())
    critic = torch.randn(len(lm.prefixes), dtype=torch.float64, generator=torch.Generator().manual_seed(1))[lm.rows_ST]
    _, targets = vtrace(
        lm.logp_ST() - behaviour, lm.rewards_ST, critic, lm.mask_ST, gamma=0.9, rho_clip=1e9, c_clip=1e9
    )
    estimate = (lm.logp_S(lm.reference()).exp() * targets.detach()[:, 0]).sum()
    torch.testing.assert_close(estimate, lm.true_values(0.9)[0, 0], **TOL)


def test_the_product_of_the_means_is_not_a_policy_gradient(lm: EnumerableLM) -> None:
    """mean(log pi) * mean(A) with A centred under the policy has gradient 0; the mean of the product has not."""
    p = lm.probabilities()
    advantages = lm.total_rewards() - (p * lm.total_rewards()).sum()
    slip = lm.gradient(-(p * lm.logp_S()).sum() * (p * advantages).sum())
    right = lm.expected_gradient(reinforce(lm.logp_S(), advantages))
    assert slip.abs().max() < 1e-12 < 1e-3 < right.abs().max()


def test_own_log_probability_as_objective_descends_entropy(lm: EnumerableLM) -> None:
    """E[grad log pi] = 0, and grad E[log pi] = -grad entropy: neither is E[R grad log pi]."""
    assert lm.expected_gradient(lm.logp_S()).abs().max() < 1e-12
    as_reward = -lm.expected_gradient(reinforce(lm.logp_S(), lm.logp_S()))
    entropy = -(lm.logp_S().exp() * lm.logp_S()).sum()
    torch.testing.assert_close(as_reward, -lm.gradient(entropy), **TOL)


def test_row46_minimum_risk_over_all_sequences_is_the_exact_objective(lm: EnumerableLM) -> None:
    loss = minimum_risk(lm.logp_S().unsqueeze(0), -lm.total_rewards().unsqueeze(0), alpha=1.0)
    torch.testing.assert_close(loss.sum(), -lm.objective(), **TOL)
    torch.testing.assert_close(lm.gradient(loss.sum()), -lm.gradient(lm.objective()), **TOL)


def test_one_token_policy_gradient_is_the_classification_form() -> None:
    lm = EnumerableLM(5, 1)
    exact = classification_policy_gradient(lm.logits, lm.reward_table).sum()
    sampled = reinforce(lm.logp_S(), lm.total_rewards())
    torch.testing.assert_close(lm.expected_gradient(sampled), lm.gradient(exact), **TOL)
    torch.testing.assert_close(exact, -lm.objective(), **TOL)
