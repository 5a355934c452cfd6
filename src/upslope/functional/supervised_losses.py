"""Losses on given sequences: likelihood, values, preferences, distillation. To be minimised, never reduced.

Reference log-probs, targets and teacher logits are constants: no gradient flows into them. "logp" of a sequence is
the sum over its completion tokens, "mean_logp" that sum divided by their number.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    aligned,
    alike,
    as_mask,
    check_broadcast,
    check_range,
    check_rank,
    clean_rows,
    floats,
    nan_unless,
    select,
    shape,
    split_finite,
)
from .kl import kl_of_logprobs
from .logprobs import log_softmax


def nll(logp: Tensor, label_smoothing: float = 0.0, mean_logp: Tensor | None = None) -> Tensor:
    """-(1 - e) log p(token) - e mean_v log p(v), per token; e = label_smoothing (Szegedy et al. 2016, 1512.00567).

    `mean_logp` is the mean log-prob over the vocabulary at each position; it is needed when e > 0.
    ValueError: e outside [0, 1], e > 0 without mean_logp, shapes differ.
    """
    check_range(0.0, 1.0, label_smoothing=label_smoothing)
    if mean_logp is None:
        if label_smoothing > 0:
            raise ValueError(f"label_smoothing = {label_smoothing} needs mean_logp, the mean over the vocabulary")
        (logp,) = floats(logp)
        return -logp
    logp, mean_logp = alike(logp=logp, mean_logp=mean_logp)
    return -(1 - label_smoothing) * logp - label_smoothing * mean_logp


def dft(logp: Tensor) -> Tensor:
    """-sg(p) log p, per token: likelihood weighted by the model's own confidence (DFT, arXiv 2508.05629, eq. 9)."""
    ok, (logp,) = split_finite(*floats(logp))
    return nan_unless(ok, -logp.detach().exp() * logp)


def value_loss(
    values: Tensor, targets: Tensor, *, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """(V - target)^2 / 2, element-wise; with `clip`, max with (V_old + clip(V - V_old, +-clip) - target)^2 / 2.

    The clipped form is PPO's (baselines, ppo2): the larger of the two, so the gradient is 0 where V has moved from
    V_old by more than `clip` towards the target. ValueError: shapes do not fit, clip and old_values not given
    together, clip not positive.
    """
    if (clip is None) != (old_values is None):
        raise ValueError(f"clip and old_values go together, got clip={clip}, old_values={old_values is not None}")
    if clip is None or old_values is None:
        ok, (values, targets) = aligned(values=values, targets=targets.detach())
        return nan_unless(ok, 0.5 * (values - targets).square())
    check_range(0.0, open_low=True, clip=clip)
    ok, (values, targets, old) = aligned(values=values, targets=targets.detach(), old_values=old_values.detach())
    clipped = old + (values - old).clamp(-clip, clip)
    return nan_unless(ok, 0.5 * torch.maximum((values - targets).square(), (clipped - targets).square()))


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: float | Tensor = 0.0, centering: float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + centering (r_c + r_r)^2, for reward models. [B], [B] -> [B].

    Margin: Llama 2 (arXiv 2307.09288, eq. 2). Centering: Eisenstein et al. 2023 (2312.09244), 0.01 there; it fixes the
    constant that the comparison leaves free.
    """
    check_range(0.0, centering=centering)
    if isinstance(margin, Tensor):
        check_broadcast(chosen=chosen, rejected=rejected, margin=margin)
        margin = margin.detach()
    chosen, rejected = alike(chosen=chosen, rejected=rejected)
    loss = -F.logsigmoid(chosen - rejected - margin)
    return loss + centering * (chosen + rejected).square() if centering else loss


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (DPO, arXiv 2305.18290, eq. 7). [B] x 4 -> [B].

    h = (chosen - ref_chosen) - (rejected - ref_rejected), of sums over tokens. e = label_smoothing in [0, 0.5) is the
    probability that a label is flipped (conservative DPO).
    """
    check_range(0.0, 0.5, label_smoothing=label_smoothing)
    h = beta * _preference_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    loss = -(1 - label_smoothing) * F.logsigmoid(h)
    return loss - label_smoothing * F.logsigmoid(-h) if label_smoothing else loss


def ipo(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float
) -> Tensor:
    """(h - 1 / (2 beta))^2, h as in `dpo` (IPO, arXiv 2310.12036, eq. 17). [B] x 4 -> [B].

    The formula does not say sums or means: pass per-token means where the target should not depend on length.
    """
    h = _preference_margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return (h - 1 / (2 * beta)).square()


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 8), from single completions labelled good or bad. [B] -> [B].

    With h = logp - ref_logp and z = max(0, kl): w_d (1 - sigmoid(beta (h - z))) where desirable, else
    w_u (1 - sigmoid(beta (z - h))). `kl` estimates KL(pi || ref) in nats per sequence: the mean of h over pairs of a
    prompt with another prompt's completion; it is a constant. ValueError: shapes do not fit, beta or a weight <= 0.
    """
    check_range(0.0, open_low=True, beta=beta)
    check_range(0.0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    desirable = as_mask(desirable, logp=logp, ref_logp=ref_logp)
    logp, ref_logp = floats(logp, ref_logp.detach())
    reference = (kl.detach() if isinstance(kl, Tensor) else torch.tensor(kl)).to(logp).clamp(min=0.0)
    if reference.dim() and reference.shape != logp.shape:
        raise ValueError(f"kl must be a number or have shape {shape(logp)}, got {shape(reference)}")
    gap = logp - ref_logp - reference
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation
    return torch.where(
        desirable, desirable_weight * torch.sigmoid(-beta * gap), undesirable_weight * torch.sigmoid(beta * gap)
    )


def orpo(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor, *, lam: float) -> Tensor:
    """-chosen_mean_logp - lam log sigmoid(log odds_c - log odds_r) (ORPO, arXiv 2403.07691, eq. 6). [B], [B] -> [B].

    odds = P / (1 - P) with P = exp(mean log-prob). P within one unit of rounding of 1 counts as that far below 1.
    ValueError: shapes differ, lam negative, a mean log-prob above 0.
    """
    check_range(0.0, lam=lam)
    chosen, rejected = alike(chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    highest = max(float(x.detach().max()) if x.numel() else 0.0 for x in (chosen, rejected))
    check_range(-math.inf, 0.0, **{"mean log-prob": highest})  # pyright: ignore[reportArgumentType]
    return -chosen - lam * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen_mean_logp: Tensor, rejected_mean_logp: Tensor, *, beta: float, margin: float) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - margin), of mean log-probs (SimPO, arXiv 2405.14734, eq. 6).

    `margin` is the paper's gamma, in units of the scaled difference. [B], [B] -> [B].
    """
    check_range(0.0, open_low=True, beta=beta)
    chosen, rejected = alike(chosen_mean_logp=chosen_mean_logp, rejected_mean_logp=rejected_mean_logp)
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def minimum_risk(logp_PG: Tensor, costs_PG: Tensor, mask_PG: Tensor | None = None, *, alpha: float) -> Tensor:
    """Expected cost under Q, Q_i proportional to P(y_i)^alpha over the group (MRT, arXiv 1512.02433, eq. 9). -> [P].

    `logp_PG` are sums over tokens; the mask removes duplicates (the paper's set has none) and missing entries.
    A group with one entry has gradient 0; an empty one is 0. ValueError: shapes differ, alpha not positive.
    """
    check_range(0.0, open_low=True, alpha=alpha)
    check_rank(2, logp_PG=logp_PG, costs_PG=costs_PG)
    mask = torch.ones_like(logp_PG, dtype=torch.bool) if mask_PG is None else mask_PG
    mask = as_mask(mask, logp_PG=logp_PG, costs_PG=costs_PG)
    logp, costs = floats(logp_PG, costs_PG.detach())
    used_P1 = mask.any(1, keepdim=True)
    scores = torch.where(mask | ~used_P1, select(mask, alpha * logp), torch.full((), -math.inf).to(logp))
    return (torch.softmax(scores, dim=1) * select(mask, costs)).sum(1)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: Literal["forward", "reverse", "jsd"] = "forward",
    weight: float = 0.5,
) -> Tensor:
    """Distance between teacher T and student S at each position, exact over the vocabulary. [..., V] -> [...].

    "forward": KL(T || S). "reverse": KL(S || T). "jsd": weight KL(T || M) + (1 - weight) KL(S || M) with
    M = weight T + (1 - weight) S, the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1);
    `weight` belongs to it alone. ValueError: shapes differ, unknown kind, weight outside (0, 1).
    """
    student_logits, teacher_logits = alike(student_logits=student_logits, teacher_logits=teacher_logits.detach())
    ok_s, student_logits = clean_rows(student_logits)
    ok_t, teacher_logits = clean_rows(teacher_logits)
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    if kind == "forward":
        value = kl_of_logprobs(teacher, student)
    elif kind == "reverse":
        value = kl_of_logprobs(student, teacher)
    elif kind == "jsd":
        if not 0.0 < weight < 1.0:
            raise ValueError(f"weight must lie in (0, 1), got {weight}: 'forward' and 'reverse' are the limits")
        mixture = _log_mixture(teacher, student, weight)
        value = weight * kl_of_logprobs(teacher, mixture) + (1 - weight) * kl_of_logprobs(student, mixture)
    else:
        raise ValueError(f"kind must be 'forward', 'reverse' or 'jsd', got {kind!r}")
    return nan_unless(ok_s & ok_t, value)


def classification_policy_gradient(logits: Tensor, rewards_per_class: Tensor) -> Tensor:
    """-sum_a pi(a) r(a): the exact expected reward of a softmax policy, negated. [..., C], [..., C] -> [...].

    Its gradient in logit j is -pi_j (r_j - sum_k pi_k r_k). With a 0/1 reward it is the cross-entropy's gradient times
    pi(right class): it vanishes where the model is confidently wrong.
    """
    check_broadcast(logits=logits, rewards_per_class=rewards_per_class)
    if logits.shape[-1:] != rewards_per_class.shape[-1:]:
        raise ValueError(f"classes must agree: logits {shape(logits)}, rewards {shape(rewards_per_class)}")
    logits, rewards = floats(logits, rewards_per_class.detach())
    ok, logits = clean_rows(logits)
    return nan_unless(ok, -(log_softmax(logits).exp() * rewards).sum(-1))


def _preference_margin(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    check_range(0.0, open_low=True, beta=beta)
    chosen, rejected, ref_chosen, ref_rejected = alike(
        chosen_logp=chosen,
        rejected_logp=rejected,
        ref_chosen_logp=ref_chosen.detach(),
        ref_rejected_logp=ref_rejected.detach(),
    )
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q); -inf where both are 0, without the NaN that logaddexp has there in backward."""
    alive = ~(log_p.detach().isneginf() & log_q.detach().isneginf())
    mixed = torch.logaddexp(select(alive, log_p) + math.log(weight), select(alive, log_q) + math.log1p(-weight))
    return torch.where(alive, mixed, torch.full((), -math.inf).to(mixed))


def _log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P <= 0; log(1 - e^x) by whichever of its two forms keeps the digits."""
    bounded = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = bounded.detach() > -math.log(2)
    half = torch.full((), -math.log(2)).to(logp)
    log_of_difference = torch.log(-torch.expm1(torch.where(near_one, bounded, half)))
    log_one_plus = torch.log1p(-torch.exp(torch.where(near_one, half, bounded)))
    return bounded - torch.where(near_one, log_of_difference, log_one_plus)
