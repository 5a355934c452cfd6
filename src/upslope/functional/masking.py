"""Sums and statistics over the positions a mask selects.

A masked position may hold NaN or infinity: values are selected before any arithmetic, so it changes neither the result
nor the gradient. Masks are booleans, or numbers that are 0 or 1, of the same shape as x. Integers are promoted to
float, half precisions to float32.
"""

from typing import Literal

import torch
from torch import Tensor

from ._checks import as_mask, check_range, check_rank, floats, select

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"]


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x over mask = 1, over all dimensions or over `dim`.

    ValueError: shapes of x and mask differ, or mask is not 0/1.
    """
    mask = as_mask(mask, x=x)
    (x,) = floats(x)
    picked = select(mask, x)
    return picked.sum() if dim is None else picked.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x over mask = 1, over all dimensions or over `dim`; 0 where nothing is selected.

    ValueError: shapes of x and mask differ, or mask is not 0/1.
    """
    mask = as_mask(mask, x=x)
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of x over mask = 1, a scalar; divides by n - 1 if `unbiased`, else by n.

    0 when fewer than two positions are selected: one token is no reason for a NaN.
    """
    mask = as_mask(mask, x=x)
    (x,) = floats(x)
    n = mask.sum()
    centred = select(mask, select(mask, x) - masked_mean(x, mask))
    return centred.square().sum() / (n - int(unbiased)).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + eps) over mask = 1, with the unbiased variance; 0 where masked.

    With shift_mean=False the mean is added back: only the scale changes (how rewards, not advantages, are whitened in
    Ziegler et al. 2019, arXiv 1909.08593). If all selected values are equal, the deviations are exactly 0 instead of
    rounding error divided by sqrt(eps).
    """
    check_range(0.0, eps=eps)
    mask = as_mask(mask, x=x)
    (x,) = floats(x)
    safe = select(mask, x)
    mean = masked_mean(x, mask)
    infinity = torch.full((), torch.inf, dtype=x.dtype, device=x.device)
    # Not (max <= min), so that a NaN varies and stays one.
    varied = (
        ~(torch.where(mask, x, -infinity).max() <= torch.where(mask, x, infinity).min()) if x.numel() else mask.any()
    )
    variance = torch.where(varied, masked_var(x, mask), torch.ones_like(mean))
    scaled = select(varied, (safe - mean) * torch.rsqrt(variance + eps))
    return select(mask, scaled if shift_mean else scaled + mean)


def loss_weights(mask_BT: Tensor, mode: Aggregation, *, constant: float | None = None) -> tuple[Tensor, float]:
    """Per-token weights and this batch's share of the denominator, for every way of averaging a token loss.

    The loss of an optimizer step is sum(weights * loss) / sum(denominators), both sums over all its micro-batches and
    ranks, so no way of splitting the step changes the gradient. Weights are 0 where masked.

    - "token_mean": every token of the step counts the same (DAPO, arXiv 2503.14476). Denominator: tokens.
    - "sequence_mean_token_mean": every sequence counts the same (GRPO, 2402.03300). Denominator: sequences.
    - "sequence_mean_token_sum": the sequence log-prob's own gradient (REINFORCE, RLOO). Denominator: sequences.
    - "constant": token sum divided by sequences * constant, the budget of a completion (Dr. GRPO, 2503.20783).

    A fully masked row weighs nothing and is not counted as a sequence. ValueError: unknown mode; a constant that is
    missing, not positive, or given with another mode.
    """
    check_rank(2, mask_BT=mask_BT)
    mask_BT = as_mask(mask_BT)
    if (mode == "constant") != (constant is not None):
        raise ValueError(f'constant goes with mode "constant" and only with it, got mode {mode!r}, constant {constant}')
    weights_BT = mask_BT.to(torch.get_default_dtype())
    lengths_B = mask_BT.sum(1)
    sequences = float((lengths_B > 0).sum())
    if mode == "token_mean":
        return weights_BT, float(lengths_B.sum())
    if mode == "sequence_mean_token_mean":
        return weights_BT / lengths_B.clamp(min=1).unsqueeze(1), sequences
    if mode == "sequence_mean_token_sum":
        return weights_BT, sequences
    if mode == "constant" and constant is not None:
        check_range(0.0, open_low=True, constant=constant)
        return weights_BT, sequences * constant
    raise ValueError(f"unknown mode {mode!r}")
