"""Checks of the formulas: gradients by finite differences, estimators against their definitions, in float64."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from upslope.commands.numerics.result import CheckFunction, Finding, at_most
from upslope.functional import kl, logprobs, policy_losses, returns, supervised_losses

STEP = 1e-6


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _logp(*shape: int) -> Tensor:
    """Log-probs well below 0, where no clip of a loss has its kink."""
    return -0.3 - torch.rand(*shape, dtype=torch.float64)


def _gradient(function: Callable[..., Tensor], *inputs: Callable[[], Tensor]) -> Finding:
    """Autograd's gradient in the first input against central differences, of a random weighting of the outputs."""
    x, *others = (make() for make in inputs)
    x.requires_grad_(True)
    weights = torch.randn_like(function(x, *others).detach())
    (exact,) = torch.autograd.grad((function(x, *others) * weights).sum(), x)
    measured = torch.zeros_like(exact)
    with torch.no_grad():
        flat, out = x.view(-1), measured.view(-1)
        for i in range(flat.numel()):
            for sign in (1.0, -1.0):
                flat[i] += sign * STEP
                out[i] += sign * float((function(x, *others) * weights).sum()) / (2 * STEP)
                flat[i] -= sign * STEP
    gap = float((exact - measured).abs().max() / measured.abs().max().clamp(min=1e-12))
    return at_most(gap, 1e-6, "relative gap to finite differences")


def _tokens(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows,))


LOGP = partial(_logp, 6)
REAL = partial(_random, 6)
ROWS = partial(_random, 6, 5)
HIDDEN = partial(_random, 6, 4)

GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[Callable[[], Tensor], ...]]] = {
    "token_logprobs": (logprobs.token_logprobs, (partial(_random, 2, 3, 5), partial(torch.randint, 5, (2, 3)))),
    "entropy": (logprobs.entropy, (ROWS,)),
    "linear_token_logprobs": (
        partial(logprobs.linear_token_logprobs, chunk=4, temperature=0.7),
        (HIDDEN, partial(_random, 5, 4), partial(_tokens, 6, 5)),
    ),
    "nll": (supervised_losses.nll, (LOGP,)),
    "value_loss": (supervised_losses.value_loss, (REAL, REAL)),
    "bradley_terry": (partial(supervised_losses.bradley_terry, margin=0.1, centering=0.01), (REAL, REAL)),
    "dpo": (partial(supervised_losses.dpo, beta=0.5, label_smoothing=0.1), (LOGP, LOGP, LOGP, LOGP)),
    "ipo": (partial(supervised_losses.ipo, beta=0.5), (LOGP, LOGP, LOGP, LOGP)),
    "orpo": (partial(supervised_losses.orpo, lam=0.5), (LOGP, LOGP)),
    "simpo": (partial(supervised_losses.simpo, beta=2.0, margin=0.5), (LOGP, LOGP)),
    "minimum_risk": (
        partial(supervised_losses.minimum_risk, alpha=0.5),
        (partial(_logp, 2, 4), partial(_random, 2, 4)),
    ),
    "divergence": (partial(supervised_losses.divergence, kind="jsd", weight=0.3), (ROWS, ROWS)),
    "classification_policy_gradient": (supervised_losses.classification_policy_gradient, (ROWS, ROWS)),
    "categorical_kl": (kl.categorical_kl, (ROWS, ROWS)),
    "k3": (kl.k3, (LOGP, LOGP)),
    "reinforce": (policy_losses.reinforce, (LOGP, REAL)),
    "clipped_surrogate": (partial(policy_losses.clipped_surrogate, clip_low=0.2, clip_high=0.3), (LOGP, LOGP, REAL)),
}
"""Functions whose gradient is the derivative of their value; those with a stopped gradient are in the test suite."""


def gae_by_definition() -> Finding:
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the unmasked tokens, with and without a bootstrap value."""
    gamma, lam, worst = 0.97, 0.9, 0.0
    rewards_BT, values_BT, bootstrap_B = _random(5, 9), _random(5, 9), _random(5)
    mask_BT = torch.rand(5, 9) > 0.3
    for bootstrap in (None, bootstrap_B):
        found_BT = returns.gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap)
        for b in range(5):
            steps = mask_BT[b].nonzero().flatten().tolist()
            values = [float(values_BT[b, t]) for t in steps] + [float(bootstrap_B[b]) if bootstrap is not None else 0.0]
            deltas = [float(rewards_BT[b, t]) + gamma * values[i + 1] - values[i] for i, t in enumerate(steps)]
            for i, t in enumerate(steps):
                expected = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(steps)))
                worst = max(worst, abs(expected - float(found_BT[b, t])))
        worst = max(worst, float(found_BT[~mask_BT].abs().max()))
    return at_most(worst, 1e-12, "largest gap")


def masked_values_do_nothing() -> Finding:
    """NaN at masked positions changes no advantage."""
    rewards_BT, values_BT = _random(4, 7), _random(4, 7)
    mask_BT = torch.rand(4, 7) > 0.4
    clean = returns.gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8)
    nan = torch.full_like(rewards_BT, float("nan"))
    dirty = returns.gae(
        torch.where(mask_BT, rewards_BT, nan), torch.where(mask_BT, values_BT, nan), mask_BT, gamma=0.9, lam=0.8
    )
    return Finding(torch.equal(clean, dirty), f"{int((clean != dirty).sum())} of {clean.numel()} advantages differ")


CHECKS: dict[str, CheckFunction] = {
    **{f"gradient of {name}": partial(_gradient, function, *inputs) for name, (function, inputs) in GRADIENTS.items()},
    "GAE against its definition": gae_by_definition,
    "NaN under the mask": masked_values_do_nothing,
}
