"""What a run reports about an update, over the trained tokens only (padding does not dilute it). No gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import as_mask, check_same_shape, floats, select
from .kl import k3
from .masking import masked_mean, masked_var


@torch.no_grad()
def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """KL(pi_old || pi) from tokens that pi_old sampled: mean of rho - 1 - log rho. `policy/approx_kl`. -> scalar.

    Never negative, and exactly 0 at the first pass over the data where log-probs are exact.
    """
    return masked_mean(k3(old_logp, logp), mask)


@torch.no_grad()
def clip_fraction(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Share of tokens whose gradient `policy_losses.clipped_surrogate` sets to 0. `policy/clipfrac`. -> scalar."""
    mask = as_mask(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    logp, old_logp, advantages = floats(logp, old_logp, advantages)
    ratio = (select(mask, logp) - select(mask, old_logp)).exp()
    raised = (advantages > 0) & (ratio > 1.0 + clip_high)
    lowered = (advantages < 0) & (ratio < 1.0 - clip_low)
    return masked_mean((raised | lowered).to(logp.dtype), mask)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one no better than a constant. -> scalar.

    NaN where the returns do not vary: the question has no answer there.
    """
    check_same_shape(values=values, returns=returns)
    mask = as_mask(mask, returns=returns)
    values, returns = floats(values, returns)
    variance = masked_var(returns, mask)
    return 1 - masked_var(select(mask, returns) - select(mask, values), mask) / torch.where(
        variance > 0, variance, torch.nan
    )
