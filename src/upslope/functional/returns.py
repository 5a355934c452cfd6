"""From rewards and values along time to returns, advantages and value targets.

Every function takes [B, T] tensors and a mask that is 1 where the policy sampled the token. Positions with mask 0
(padding, or what a tool or a user put inside the row) are skipped: the recursion is carried through them unchanged, no
discount is applied, and the result there is 0. They may hold NaN. A reward for what happened at a skipped position
belongs on the last sampled token before it.

`bootstrap_B` is V of the state after the row's last sampled token: 0 (the default, None) where the episode ended
there, the critic's estimate where it was only cut off (Pardo et al. 2018, arXiv 1712.00378).

Results are differentiable, because nothing here detaches; the losses detach the advantages and targets they are given.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import as_mask, check_range, check_rank, floats, select, shape


def discounted_returns(
    rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float, bootstrap_B: Tensor | None = None
) -> Tensor:
    """Monte Carlo returns to go, G_t = r_t + gamma G_{t+1}, with G after the last step = bootstrap. -> [B, T].

    ValueError: shapes do not fit, gamma outside [0, 1].
    """
    (rewards_BT,), mask_BT, carry_B = _prepare(mask_BT, bootstrap_B, gamma, rewards_BT=rewards_BT)
    return _backwards(lambda t, carry_B: (rewards_BT[:, t] + gamma * carry_B,), mask_BT, rewards_BT, carry_B)


def lambda_returns(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """TD(lambda) targets, G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}). -> [B, T].

    Sutton & Barto, 2nd ed., eq. 12.2 in its recursive form; equal to `gae` + values. lam = 1 gives
    `discounted_returns`, lam = 0 the one-step target. `lam` is a number or a tensor [B].
    """
    (rewards_BT, values_BT), mask_BT, next_value_B = _prepare(
        mask_BT, bootstrap_B, gamma, rewards_BT=rewards_BT, values_BT=values_BT
    )
    lam = _lam(lam, rewards_BT)

    def step(t: int, carry_B: Tensor, next_value_B: Tensor) -> tuple[Tensor, Tensor]:
        return rewards_BT[:, t] + gamma * ((1 - lam) * next_value_B + lam * carry_B), values_BT[:, t]

    return _backwards(step, mask_BT, rewards_BT, next_value_B, next_value_B)


def n_step_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, n: int, bootstrap_B: Tensor | None = None
) -> Tensor:
    """A_t = sum_{k<n} gamma^k r_{t+k} + gamma^n V_{t+n} - V_t (A3C, Mnih et al. 2016, arXiv 1602.01783). -> [B, T].

    Steps are counted over sampled tokens. Where fewer than n remain, the sum runs to the end of the row and the
    bootstrap value takes the place of V. n = 1 is the TD error; n >= T is `discounted_returns` - values.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    (rewards_BT, values_BT), mask_BT, bootstrap_value_B = _prepare(
        mask_BT, bootstrap_B, gamma, rewards_BT=rewards_BT, values_BT=values_BT
    )
    B, T = rewards_BT.shape
    # sampled tokens moved to the front, in order
    order_BT = torch.argsort(mask_BT.to(torch.int8), dim=1, descending=True, stable=True)
    rewards_c, values_c = rewards_BT.gather(1, order_BT), values_BT.gather(1, order_BT)
    length_B1 = mask_BT.sum(1, keepdim=True)
    steps_T = torch.arange(T, device=rewards_BT.device)
    total_BT = torch.zeros_like(rewards_c)
    for k in range(min(n, T)):
        total_BT = total_BT + gamma**k * torch.cat([rewards_c[:, k:], rewards_c.new_zeros(B, k)], dim=1)
    end_BT = torch.minimum(steps_T + n, length_B1)
    following_BT = torch.where(
        end_BT < length_B1, values_c.gather(1, end_BT.clamp(max=max(T - 1, 0))), bootstrap_value_B.unsqueeze(1)
    )
    powers_BT = torch.pow(torch.full_like(rewards_c, gamma), (end_BT - steps_T).clamp(min=0))
    advantages_c = total_BT + powers_BT * following_BT - values_c
    return select(mask_BT, torch.zeros_like(rewards_c).scatter(1, order_BT, advantages_c))


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16). -> [B, T], 0 where masked.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}.

    `lam` is a number or a tensor [B] (`length_adaptive_lambda`). Value targets are A + V, before any whitening.
    ValueError: shapes do not fit, gamma or lam outside [0, 1].
    """
    (rewards_BT, values_BT), mask_BT, next_value_B = _prepare(
        mask_BT, bootstrap_B, gamma, rewards_BT=rewards_BT, values_BT=values_BT
    )
    lam = _lam(lam, rewards_BT)

    def step(t: int, carry_B: Tensor, next_value_B: Tensor) -> tuple[Tensor, Tensor]:
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        return delta_B + gamma * lam * carry_B, values_BT[:, t]

    return _backwards(step, mask_BT, rewards_BT, torch.zeros_like(next_value_B), next_value_B)


def vtrace(
    log_ratio_BT: Tensor,
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace (Espeholt et al. 2018, arXiv 1802.01561, section 4.1). -> (advantages_BT, targets_BT), 0 where masked.

    log_ratio = log pi - log mu of the sampled token, pi the policy trained and mu the one that sampled.
    rho_t = min(rho_clip, pi/mu), c_t = lam min(c_clip, pi/mu);
    targets v_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t (v_{t+1} - V_{t+1});
    advantages rho_t (r_t + gamma v_{t+1} - V_t), as in the paper: lam acts on the targets only.

    With log_ratio = 0, targets are `lambda_returns`. The ratios are constants: no gradient flows into log_ratio.
    ValueError: shapes do not fit, gamma or lam outside [0, 1], a clip not positive.
    """
    check_range(0.0, open_low=True, rho_clip=rho_clip, c_clip=c_clip)
    check_range(0.0, 1.0, lam=lam)
    (log_ratio_BT, rewards_BT, values_BT), mask_BT, next_value_B = _prepare(
        mask_BT, bootstrap_B, gamma, log_ratio_BT=log_ratio_BT, rewards_BT=rewards_BT, values_BT=values_BT
    )
    ratio_BT = log_ratio_BT.detach().exp()
    rho_BT, c_BT = ratio_BT.clamp(max=rho_clip), lam * ratio_BT.clamp(max=c_clip)
    advantages: list[Tensor] = []

    def step(t: int, next_target_B: Tensor, next_value_B: Tensor) -> tuple[Tensor, Tensor]:
        value_B, rho_B = values_BT[:, t], rho_BT[:, t]
        delta_B = rho_B * (rewards_BT[:, t] + gamma * next_value_B - value_B)
        target_B = value_B + delta_B + gamma * c_BT[:, t] * (next_target_B - next_value_B)
        advantages.append(rho_B * (rewards_BT[:, t] + gamma * next_target_B - value_B))
        return target_B, value_B

    targets_BT = _backwards(step, mask_BT, rewards_BT, next_value_B, next_value_B)
    return _stack(advantages, mask_BT, rewards_BT), targets_BT


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """lam = 1 - 1 / (alpha * length), clamped to [0, 1] (VAPO, arXiv 2504.05118, eq. 9). [B] -> [B], for `gae`.

    The paper's formula is negative below length 1 / alpha; the clamp makes it 0 (one-step TD) there.
    ValueError: alpha not positive, a negative length.
    """
    check_range(0.0, open_low=True, alpha=alpha)
    (lengths,) = floats(lengths)
    if bool((lengths < 0).any()):
        raise ValueError(f"lengths must not be negative, got {float(lengths.min())}")
    return (1 - 1 / (alpha * lengths)).clamp(0.0, 1.0)


def _prepare(
    mask_BT: Tensor, bootstrap_B: Tensor | None, gamma: float, **tensors: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Check, promote to one dtype, and zero what is masked: (tensors, boolean mask, bootstrap)."""
    check_range(0.0, 1.0, gamma=gamma)
    check_rank(2, mask_BT=mask_BT, **tensors)
    mask_BT = as_mask(mask_BT, **tensors)
    B = mask_BT.shape[0]
    if bootstrap_B is not None and tuple(bootstrap_B.shape) != (B,):
        raise ValueError(f"bootstrap_B must have shape [{B}], got {shape(bootstrap_B)}")
    everything = [*tensors.values()] if bootstrap_B is None else [*tensors.values(), bootstrap_B]
    promoted = floats(*everything)
    values = tuple(select(mask_BT, x) for x in promoted[: len(tensors)])
    bootstrap = promoted[0].new_zeros(B) if bootstrap_B is None else promoted[-1]
    return values, mask_BT, bootstrap


def _lam(lam: float | Tensor, like_BT: Tensor) -> float | Tensor:
    if not isinstance(lam, Tensor):
        check_range(0.0, 1.0, lam=lam)
        return lam
    if lam.dim() > 0 and tuple(lam.shape) != (like_BT.shape[0],):
        raise ValueError(f"lam must be a number or have shape [{like_BT.shape[0]}], got {shape(lam)}")
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam must lie in [0, 1], got values from {lam.min()} to {lam.max()}")
    return lam.to(like_BT)


def _backwards(step: Callable[..., tuple[Tensor, ...]], mask_BT: Tensor, like_BT: Tensor, *carry: Tensor) -> Tensor:
    """The first of what step(t, *carry) gives at every t, from the last on; skipped positions carry it on. [B, T]."""
    found: list[Tensor] = []
    for t in reversed(range(like_BT.shape[1])):
        on_B = mask_BT[:, t]
        carry = tuple(torch.where(on_B, new, old) for new, old in zip(step(t, *carry), carry, strict=True))
        found.append(carry[0])
    return _stack(found, mask_BT, like_BT)


def _stack(steps: list[Tensor], mask_BT: Tensor, like_BT: Tensor) -> Tensor:
    return select(mask_BT, torch.stack(steps[::-1], dim=1)) if steps else torch.zeros_like(like_BT)
