"""Everything over the vocabulary on the CPU: log-softmax, its gradient, and drawing tokens (vocabulary.cpp).

Shapes: N rows, V vocabulary (at least 1). Logits are float32 or bfloat16, results float32. With z = logits /
temperature in float32, every log-prob is (z - max z) - log sum e^(z - max z), the same bits from every function here,
wherever the row lies and whatever stands beside it. Probabilities below e^-87 count as 0. A row with NaN or +inf in
it, or of -inf alone, has NaN for everything.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from upslope.kernels import Functions, addresses, kind_of

_SIZES = [c_int64, c_int64, c_int64, c_float]
_lib = Functions(
    log_softmax=[c_int, *[c_void_p] * 2, *_SIZES],
    logprobs=[c_int, *[c_void_p] * 7, *_SIZES],
    logits_gradient=[c_int, *[c_void_p] * 8, *_SIZES],
    sample=[c_int, *[c_void_p] * 4, *_SIZES],
)


class Statistics(NamedTuple):
    """Of each row [N]: its token's log-prob, entropy, mean log-prob over V; max z and log sum e^(z - max z)."""

    logp: Tensor
    entropy: Tensor | None = None
    mean: Tensor | None = None
    maximum: Tensor | None = None
    log_sum: Tensor | None = None

    def of(self, rows: Tensor) -> Statistics:
        """Those of some rows."""
        return self._make(None if x is None else x[rows] for x in self)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, without gradient. [..., V] -> [..., V]."""
    rows = _rows(logits.reshape(-1, logits.shape[-1]))
    out = torch.empty(rows.shape, dtype=torch.float32)
    _lib.log_softmax(kind_of(rows.dtype), *addresses(rows, out), *_sizes(rows), temperature)
    return out.view(logits.shape)


def statistics(
    logits_NV: Tensor, tokens_N: Tensor, temperature: float, *, with_entropy: bool = False, with_mean: bool = False
) -> Statistics:
    """The rows' statistics; tokens are int64 in 0..V-1."""
    rows, tokens = _rows(logits_NV), tokens_N.contiguous()
    logp, maximum, log_sum = (torch.empty(len(rows), dtype=torch.float32) for _ in range(3))
    entropy, mean = (torch.empty_like(logp) if wanted else None for wanted in (with_entropy, with_mean))
    tensors = addresses(rows, tokens, logp, maximum, log_sum, entropy, mean)
    _lib.logprobs(kind_of(rows.dtype), *tensors, *_sizes(rows), temperature)
    return Statistics(logp, entropy, mean, maximum, log_sum)


def logits_gradient_(
    logits_NV: Tensor,
    tokens_N: Tensor,
    found: Statistics,
    temperature: float,
    grad_logp_N: Tensor,
    grad_entropy_N: Tensor | None = None,
    grad_mean_N: Tensor | None = None,
) -> Tensor:
    """Overwrite the logits by the gradient of sum(grad_logp logp + grad_entropy H + grad_mean mean) in them.

    `found` are their statistics, with the entropy where its gradient is given. The gradients are float32.
    """
    assert logits_NV.stride(1) == 1, "the rows are overwritten where they lie"
    tensors = (tokens_N, found.maximum, found.log_sum, grad_logp_N, found.entropy, grad_entropy_N, grad_mean_N)
    held = [None if x is None else x.contiguous() for x in tensors]
    _lib.logits_gradient(kind_of(logits_NV.dtype), *addresses(logits_NV, *held), *_sizes(logits_NV), temperature)
    return logits_NV


def sample(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling in token order with float64 uniforms in [0, 1]: tokens int64 [N], their log-probs [N].

    The first token whose cumulative probability exceeds u is taken, but never one of probability 0.
    """
    rows, uniform = _rows(logits_NV), uniform_N.contiguous()
    tokens, logp = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows), dtype=torch.float32)
    _lib.sample(kind_of(rows.dtype), *addresses(rows, uniform, tokens, logp), *_sizes(rows), temperature)
    return tokens, logp


def _rows(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()


def _sizes(rows: Tensor) -> tuple[int, int, int]:
    return rows.shape[0], rows.shape[1], rows.stride(0)
