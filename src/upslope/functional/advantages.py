"""Advantages from comparing the samples of one prompt: the group axis, where `returns` is the time axis.

Rewards are [P, G]: P prompts, G completions each. mask_PG is 0 where a completion has no reward (its judge failed);
such entries may hold NaN, count for nothing, and get advantage 0. A group whose rewards are all equal, or that has a
single valid reward, gets exactly 0. Statistics are computed in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import as_mask, check_range, check_rank, floats, select, shape


def group_centered(rewards_PG: Tensor, mask_PG: Tensor | None = None) -> Tensor:
    """A_i = R_i - mean_j R_j (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). -> [P, G].

    Its expected policy gradient is (G - 1) / G times the true one; `leave_one_out` removes the factor.
    ValueError: not two-dimensional, shapes differ, a valid reward is not finite.
    """
    group = _statistics(rewards_PG, mask_PG)
    return group.centred_PG.to(group.dtype)


def group_normalized(
    rewards_PG: Tensor, mask_PG: Tensor | None = None, *, eps: float = 1e-4, unbiased: bool = True
) -> Tensor:
    """A_i = (R_i - mean) / (std + eps) over the group (GRPO, Shao et al. 2024, arXiv 2402.03300). -> [P, G].

    The division up-weights prompts that are nearly always or nearly never solved: with 0/1 rewards it ascends
    E[2 asin sqrt p] in large groups, not E[p]. `unbiased` divides the variance by n - 1.
    """
    check_range(0.0, eps=eps)
    group = _statistics(rewards_PG, mask_PG)
    variance_P1 = group.centred_PG.square().sum(1, keepdim=True) / (group.count_P1 - int(unbiased)).clamp(min=1)
    std_P1 = torch.where(group.varied_P1, variance_P1, torch.ones_like(variance_P1)).sqrt()
    return (group.centred_PG / (std_P1 + eps)).to(group.dtype)


def leave_one_out(rewards_PG: Tensor, mask_PG: Tensor | None = None) -> Tensor:
    """A_i = R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean) (RLOO: Kool et al. 2019; arXiv 2402.14740). -> [P, G].

    The baseline does not depend on sample i, so the policy gradient is unbiased. A group with one valid reward has no
    baseline and gets 0, never the raw reward.
    """
    group = _statistics(rewards_PG, mask_PG)
    return (group.centred_PG * group.count_P1 / (group.count_P1 - 1).clamp(min=1)).to(group.dtype)


def has_signal(rewards_PG: Tensor, mask_PG: Tensor | None = None) -> Tensor:
    """True for the groups whose valid rewards are not all equal (max > min): what dynamic sampling keeps. -> [P].

    DAPO, Yu et al. 2025, arXiv 2503.14476. Its complement's share is the metric `frac_reward_zero_std`.
    """
    return _statistics(rewards_PG, mask_PG).varied_P1.squeeze(1)


class _Group(NamedTuple):
    centred_PG: Tensor
    count_P1: Tensor
    varied_P1: Tensor
    dtype: torch.dtype


def _statistics(rewards_PG: Tensor, mask_PG: Tensor | None) -> _Group:
    check_rank(2, rewards_PG=rewards_PG)
    mask = as_mask(torch.ones_like(rewards_PG, dtype=torch.bool) if mask_PG is None else mask_PG, rewards_PG=rewards_PG)
    (rewards,) = floats(rewards_PG)
    dtype = rewards.dtype
    finite = select(mask, rewards).isfinite()
    if not bool(finite.all()):
        where: list[int] = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"rewards_PG{where} is {float(rewards[tuple(where)])}: mask it out or give a finite reward "
            f"(shape {shape(rewards)})"
        )
    rewards = select(mask, rewards).double()
    count = mask.sum(1, keepdim=True)
    mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    if rewards.shape[1] == 0:
        return _Group(rewards, count, count > 0, dtype)
    infinity = torch.full((), torch.inf, dtype=rewards.dtype, device=rewards.device)
    high, low = torch.where(mask, rewards, -infinity), torch.where(mask, rewards, infinity)
    varied = high.amax(1, keepdim=True) > low.amin(1, keepdim=True)
    return _Group(select(mask & varied, rewards - mean), count, varied, dtype)
