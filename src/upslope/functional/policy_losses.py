"""Policy-gradient losses, to be minimised: one value per token (or per sequence), never reduced.

Advantages, old log-probs and weights are constants: no gradient flows into them. Inputs have equal shapes, or
broadcast with the same number of dimensions (advantages [B, 1] beside log-probs [B, T]). Element-wise functions have
no mask: a NaN input gives NaN there, with gradient 0, so that selecting the trained tokens afterwards
(`masking.masked_sum`) is safe. Where a ratio overflows the loss is infinite and shows; it is not clamped silently.
"""

from typing import Literal

import torch
from torch import Tensor

from ._checks import (
    aligned,
    as_mask,
    check_range,
    check_rank,
    floats,
    nan_unless,
    safe_exp,
    select,
    shape,
    split_finite,
)
from .masking import masked_mean, masked_sum


def reinforce(logp: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi (Williams 1992). The product is per token: mean(A) * mean(log pi) is something else."""
    ok, (logp, advantages) = aligned(logp=logp, advantages=advantages.detach())
    return nan_unless(ok, -logp * advantages)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old (PPO, arXiv 1707.06347, eq. 7).

    The gradient is 0 exactly where A > 0 and rho > 1 + clip_high, or A < 0 and rho < 1 - clip_low. Unequal bounds are
    DAPO's clip-higher (2503.14476). `dual_clip` = c > 1 bounds the objective from below by c A where A < 0
    (Ye et al. 2019, 1912.09729). ValueError: shapes do not fit, a negative clip, dual_clip <= 1.
    """
    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    ok, (logp, old_logp, advantages) = _aligned(logp, old_logp, advantages)
    objective = _clipped_objective(logp - old_logp, advantages, clip_low, clip_high)
    if dual_clip is not None:
        check_range(1.0, open_low=True, dual_clip=dual_clip)
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return nan_unless(ok, -objective)


def sequence_clipped_surrogate(
    logp_BT: Tensor, old_logp_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-min(s A, clip(s) A) with s = exp(mean_t (log pi - log pi_old)) per sequence (GSPO, arXiv 2507.18071). -> [B].

    The ratio is the geometric mean over the mask, so the paper's clips are small (3e-4, 4e-4). 0 for a fully masked
    row. ValueError: shapes do not fit, a negative clip.
    """
    check_range(0.0, clip_low=clip_low, clip_high=clip_high)
    check_rank(2, logp_BT=logp_BT)
    mask_BT = as_mask(mask_BT, logp_BT=logp_BT, old_logp_BT=old_logp_BT)
    if tuple(advantages_B.shape) != (logp_BT.shape[0],):
        raise ValueError(f"advantages_B must have shape [{logp_BT.shape[0]}], got {shape(advantages_B)}")
    logp, old_logp, advantages = floats(logp_BT, old_logp_BT.detach(), advantages_B.detach())
    log_ratio_B = masked_mean(select(mask_BT, logp) - select(mask_BT, old_logp), mask_BT, dim=1)
    used_B = mask_BT.any(1)
    ok_B, (log_ratio_B, advantages) = split_finite(log_ratio_B, select(used_B, advantages))
    loss_B = -_clipped_objective(log_ratio_B, advantages, clip_low, clip_high)
    return nan_unless(ok_B, select(used_B, loss_B))


def clipped_is_reinforce(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, clip_high: float, clip_low: float | None = None
) -> Tensor:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi (CISPO, arXiv 2506.13585, eq. 4).

    The clipped ratio is a constant weight, so no token loses its gradient. clip_high = 0.28 caps the ratio at 1.28
    (some libraries take the cap itself); clip_low None leaves the lower side free, as the paper does.
    """
    check_range(0.0, clip_high=clip_high, clip_low=clip_low)
    ok, (logp, old_logp, advantages) = _aligned(logp, old_logp, advantages)
    low = None if clip_low is None else 1.0 - clip_low
    weight = (logp.detach() - old_logp).exp().clamp(min=low, max=1.0 + clip_high)
    return nan_unless(ok, -weight * advantages * logp)


def soft_gated(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> Tensor:
    """-f(rho) A with f = (4 / tau) sigmoid(tau (rho - 1)), tau by the sign of A (SAPO, arXiv 2511.20347).

    A smooth trust region instead of a clip: f has slope 1 at rho = 1 and flattens away from it.
    ValueError: shapes do not fit, a tau not positive.
    """
    check_range(0.0, open_low=True, tau_positive=tau_positive, tau_negative=tau_negative)
    ok, (logp, old_logp, advantages) = _aligned(logp, old_logp, advantages)
    positive, negative = (logp.new_full((), tau) for tau in (tau_positive, tau_negative))
    tau = torch.where(advantages > 0, positive, negative)
    gate = torch.sigmoid(tau * (safe_exp(logp - old_logp) - 1)) * (4 / tau)
    return nan_unless(ok, -gate * advantages)


def importance_weights(
    train_logp_BT: Tensor,
    rollout_logp_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: Literal["token", "sequence", "geometric"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    low: float | None = None,
    high: float,
) -> Tensor:
    """Constant weights that correct for sampling from another policy than the trainer's. -> [B, T], 0 where masked.

    w = pi_train / pi_rollout, both before the update. `level`: of each token; of the whole sequence (the product,
    unbiased, high variance); "geometric", the sequence's per-token mean. `mode` "truncate" limits w to [low, high]
    (TIS); "mask" sets it to 0 outside them (IcePop, arXiv 2510.18855). low None leaves the lower side free.

    Multiply the loss of a token by its weight. The loss's own ratio is then pi / pi_train: do not use the rollout's
    log-probs there as well. ValueError: shapes do not fit, unknown level or mode, bounds not 0 <= low <= high.
    """
    check_rank(2, train_logp_BT=train_logp_BT)
    mask_BT = as_mask(mask_BT, train_logp_BT=train_logp_BT, rollout_logp_BT=rollout_logp_BT)
    check_range(0.0, open_low=True, high=high)
    check_range(0.0, high, low=low)
    train, rollout = floats(train_logp_BT.detach(), rollout_logp_BT.detach())
    log_ratio_BT = select(mask_BT, train) - select(mask_BT, rollout)
    if level == "sequence":
        log_ratio_BT = masked_sum(log_ratio_BT, mask_BT, dim=1).unsqueeze(1).expand_as(log_ratio_BT)
    elif level == "geometric":
        log_ratio_BT = masked_mean(log_ratio_BT, mask_BT, dim=1).unsqueeze(1).expand_as(log_ratio_BT)
    elif level != "token":
        raise ValueError(f"level must be 'token', 'sequence' or 'geometric', got {level!r}")
    weights_BT = log_ratio_BT.exp()
    floor = 0.0 if low is None else low
    if mode == "truncate":
        weights_BT = weights_BT.clamp(floor, high)
    elif mode == "mask":
        outside_BT = (weights_BT < floor) | (weights_BT > high)
        weights_BT = weights_BT.masked_fill(outside_BT, 0.0)
    else:
        raise ValueError(f"mode must be 'truncate' or 'mask', got {mode!r}")
    return select(mask_BT, weights_BT)


def _aligned(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return aligned(logp=logp, old_logp=old_logp.detach(), advantages=advantages.detach())


def _clipped_objective(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    ratio = safe_exp(log_ratio)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    # a ratio of inf times A = 0 is NaN; the clipped side is the minimum's meaning there
    unclipped = torch.where((advantages == 0) & ratio.isinf(), torch.zeros_like(ratio), ratio * advantages)
    return torch.minimum(unclipped, clipped * advantages)
