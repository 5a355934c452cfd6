"""Estimators of KL(pi || ref) from the tokens that pi sampled, and the controller of the penalty's weight.

With d = log pi - log ref at the sampled token. Which to use depends on where it stands (proved by enumeration in the
tests; Schulman, joschu.net/blog/kl-approx; arXiv 2510.01555):

================  ===========================  ==========================================  ========================
estimator         expected value               expected gradient, as a loss                as a (negative) reward
================  ===========================  ==========================================  ========================
k1 = d            KL(pi || ref)                0: it teaches nothing                       exact gradient of the KL
k2 = d^2 / 2      biased                       gradient of KL(pi || ref) at each state     biased
k3 = e^-d - 1 + d KL(pi || ref), never < 0     gradient of KL(ref || pi) at each state     KL(pi||ref) - KL(ref||pi)
importance_k1     KL(pi || ref)                gradient of KL(pi || ref) at each state     not meant for it
================  ===========================  ==========================================  ========================

"At each state": the effect of a token on the KL of later tokens is left out. k1 in the reward, with returns to go, has
it. No gradient flows into ref_logp or old_logp. Results are element-wise; a NaN input gives NaN with gradient 0.
"""

from torch import Tensor

from ._checks import aligned, check_range, clean_rows, floats, nan_unless, safe_exp, safe_expm1, select
from .logprobs import log_softmax


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log pi - log ref. Unbiased, may be negative. For the reward: r_t - beta * k1_t."""
    ok, d = _difference(logp, ref_logp)
    return nan_unless(ok, d)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2. Biased value; as a loss it has the per-state gradient of KL(pi || ref)."""
    ok, d = _difference(logp, ref_logp)
    return nan_unless(ok, 0.5 * d.square())


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi). Unbiased and never negative; as a loss it has the gradient of KL(ref || pi).

    The value is not clamped: where ref / pi overflows it is inf, and says so.
    """
    ok, d = _difference(logp, ref_logp)
    return nan_unless(ok, safe_expm1(-d) + d)


def importance_k1(logp: Tensor, ref_logp: Tensor, old_logp: Tensor | None = None) -> Tensor:
    """(pi / pi_old) * (log pi - log ref), the ratio differentiable: KL(pi || ref) and its gradient, per state.

    old_logp are the log-probs of the policy that sampled; None means pi itself, whose ratio is 1 with a gradient.
    """
    old_logp = logp.detach() if old_logp is None else old_logp.detach()
    ok, (logp, ref_logp, old_logp) = aligned(logp=logp, ref_logp=ref_logp.detach(), old_logp=old_logp)
    return nan_unless(ok, safe_exp(logp - old_logp) * (logp - ref_logp))


def rollout_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """pi / pi_old - 1 - log(pi / pi_old) of tokens that pi_old sampled: KL(pi_old || pi), value and gradient unbiased.

    The penalty form of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 8). Never negative; old_logp is detached.
    """
    ok, (logp, old_logp) = aligned(logp=logp, old_logp=old_logp.detach())
    return nan_unless(ok, safe_expm1(logp - old_logp) - (logp - old_logp))


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) of two softmax distributions, exact. [..., V] -> [...].

    Differentiable in both. Where p_v = 0 the summand is 0; where only q_v = 0 the result is inf.
    ValueError: shapes differ.
    """
    if p_logits.shape != q_logits.shape or p_logits.dim() == 0:
        raise ValueError(f"logits must have one shape [..., V]: {list(p_logits.shape)}, {list(q_logits.shape)}")
    p_logits, q_logits = floats(p_logits, q_logits)
    ok_p, p_logits = clean_rows(p_logits)
    ok_q, q_logits = clean_rows(q_logits)
    return nan_unless(ok_p & ok_q, kl_of_logprobs(log_softmax(p_logits), log_softmax(q_logits)))


def kl_of_logprobs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log q_v) from normalised log-probs [..., V] -> [...]; summands with p_v = 0 are 0."""
    support = ~log_p.detach().isneginf()
    return (log_p.exp() * (select(support, log_p) - select(support, log_q))).sum(-1)


def _difference(logp: Tensor, ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """(where it is finite, log pi - log ref with 0 elsewhere)."""
    ok, (logp, ref_logp) = aligned(logp=logp, ref_logp=ref_logp.detach())
    return ok, logp - ref_logp


class AdaptiveKL:
    """Proportional controller of the KL coefficient (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    update(kl, n): coef <- coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """Start at `coef`; `target` in nats per sequence; `horizon` in sequences. ValueError unless all positive."""
        check_range(0.0, open_low=True, coef=coef, target=target, horizon=horizon)
        self.coef = float(coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float | Tensor, n: int) -> float:
        """Move the coefficient once and return it.

        `kl`: mean over sequences of the KL summed over each sequence's tokens (nats); `n`: sequences it was measured
        on. Once per batch of rollouts, not per micro-batch. ValueError: kl not finite, n < 1, or n so large against
        the horizon that the coefficient would not stay positive.
        """
        measured = float(kl)
        check_range(-1e30, 1e30, kl=measured)
        check_range(1, n=n)
        error = min(max(measured / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * n / self.horizon
        if factor <= 0:
            raise ValueError(
                f"n = {n} is too large for horizon = {self.horizon:g}: the coefficient would not be positive"
            )
        self.coef *= factor
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold: the coefficient (target and horizon are configuration)."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`. ValueError: other keys, or a coefficient that is not positive."""
        if set(state) != {"coef"}:
            raise ValueError(f"state of AdaptiveKL must have the key 'coef' only, got {sorted(state)}")
        check_range(0.0, open_low=True, coef=state["coef"])
        self.coef = float(state["coef"])
