"""What a run reports about an update, over the trained tokens only (padding does not dilute it). No gradients."""

import torch
from torch import Tensor

from ._checks import alike, as_mask, select
from .kl import k3
from .masking import masked_mean, masked_var


@torch.no_grad()
def approx_kl(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """KL(pi_old || pi) from tokens that pi_old sampled: mean of rho - 1 - log rho. `policy/approx_kl`. -> scalar.

    Never negative, and exactly 0 at the first pass over the data where log-probs are exact.
    """
    return masked_mean(k3(old_logp, logp), mask)


@torch.no_grad()
def token_ratios(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What an update reports of each token, before any mean: `val/ratio`, `policy/approx_kl`, `policy/clipfrac`.

    Any shape, the same for all. -> (rho = pi / pi_old, rho - 1 - log rho, clipped); clipped (bool) is where
    `policy_losses.clipped_surrogate` has gradient 0.
    """
    logp, old_logp, advantages = alike(logp=logp, old_logp=old_logp, advantages=advantages)
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return ratio, ratio - 1 - log_ratio, clipped


@torch.no_grad()
def clip_fraction(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Share of tokens whose gradient `policy_losses.clipped_surrogate` sets to 0. `policy/clipfrac`. -> scalar."""
    mask = as_mask(mask, logp=logp, old_logp=old_logp, advantages=advantages)
    ratio, _, clipped = token_ratios(
        *(select(mask, x) for x in (logp, old_logp, advantages)), clip_low=clip_low, clip_high=clip_high
    )
    return masked_mean(clipped.to(ratio.dtype), mask)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one no better than a constant. -> scalar.

    NaN where the returns do not vary: the question has no answer there.
    """
    values, returns = alike(values=values, returns=returns)
    mask = as_mask(mask, returns=returns)
    variance = masked_var(returns, mask)
    return 1 - masked_var(select(mask, returns) - select(mask, values), mask) / torch.where(
        variance > 0, variance, torch.nan
    )
