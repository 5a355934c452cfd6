"""Float64 oracles in plain Python, each written from its definition as a sum, not as the recursion under test.

Rows are lists of floats without padding or skipped tokens. Nothing of the package under test is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def returns(r: Row, gamma: float, bootstrap: float = 0.0) -> list[float]:
    """G_t = sum_{k >= t} gamma^(k-t) r_k + gamma^(T-t) bootstrap."""
    T = len(r)
    return [sum(gamma ** (k - t) * r[k] for k in range(t, T)) + gamma ** (T - t) * bootstrap for t in range(T)]


def n_step_return(r: Row, v: Row, t: int, n: int, gamma: float, bootstrap: float = 0.0) -> float:
    """sum_{k < n} gamma^k r_{t+k} + gamma^n V_{t+n}, cut at the end of the row."""
    T = len(r)
    n = min(n, T - t)
    following = [*v, bootstrap]
    return sum(gamma**k * r[t + k] for k in range(n)) + gamma**n * following[t + n]


def lambda_returns(r: Row, v: Row, gamma: float, lam: float, bootstrap: float = 0.0) -> list[float]:
    """(1 - lam) sum_{n < N} lam^(n-1) G^(n) + lam^(N-1) G^(N), N the steps that remain."""
    out = []
    for t in range(len(r)):
        N = len(r) - t
        total = lam ** (N - 1) * n_step_return(r, v, t, N, gamma, bootstrap)
        total += sum((1 - lam) * lam ** (n - 1) * n_step_return(r, v, t, n, gamma, bootstrap) for n in range(1, N))
        out.append(total)
    return out


def deltas(r: Row, v: Row, gamma: float, bootstrap: float = 0.0) -> list[float]:
    following = [*v[1:], bootstrap]
    return [r[t] + gamma * following[t] - v[t] for t in range(len(r))]


def gae(r: Row, v: Row, gamma: float, lam: float, bootstrap: float = 0.0) -> list[float]:
    """sum_k (gamma lam)^k delta_{t+k}."""
    d = deltas(r, v, gamma, bootstrap)
    return [sum((gamma * lam) ** (k - t) * d[k] for k in range(t, len(r))) for t in range(len(r))]


def vtrace(
    log_ratio: Row,
    r: Row,
    v: Row,
    gamma: float,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    bootstrap: float = 0.0,
) -> tuple[list[float], list[float]]:
    """v_t = V_t + sum_k gamma^(k-t) (prod_{t <= i < k} c_i) rho_k delta_k (eq. 1); -> advantages, targets."""
    T = len(r)
    rho = [min(rho_clip, math.exp(x)) for x in log_ratio]
    c = [lam * min(c_clip, math.exp(x)) for x in log_ratio]
    d = deltas(r, v, gamma, bootstrap)
    targets = [v[t] + sum(gamma ** (k - t) * math.prod(c[t:k]) * rho[k] * d[k] for k in range(t, T)) for t in range(T)]
    following = [*targets[1:], bootstrap]
    return [rho[t] * (r[t] + gamma * following[t] - v[t]) for t in range(T)], targets


def log_softmax(z: Row, temperature: float = 1.0) -> list[float]:
    scaled = [x / temperature for x in z]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    return [x - total for x in scaled]


def kl(p_logits: Row, q_logits: Row) -> float:
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(log_softmax(p_logits), log_softmax(q_logits), strict=True))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))
