"""What is done row by row on the CPU: parts of a Transformer block, everything over the vocabulary; sums of gradients.

Parts of a block, forward and backward (rows.cpp). T rows, D width, F feed-forward width, H query heads, K key/value
heads, d head width. All tensors are of one dtype, float32 or bfloat16; arithmetic is float32.

Log-softmax, its gradient, and drawing tokens (vocabulary.cpp). N rows, V vocabulary (at least 1). Logits are float32
or bfloat16, results float32. With z = logits / temperature in float32, every log-prob is (z - max z) - log sum
e^(z - max z), the same bits from every function here, wherever the row lies and whatever stands beside it.
Probabilities below e^-87 count as 0. A row with NaN or +inf in it, or of -inf alone, has NaN for everything.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from upslope.kernels import Functions, addresses, kind_of, usable

_SLABS = 16
_SIZES = [c_int64, c_int64, c_int64, c_float]
_lib = Functions(
    norm_forward=[c_int, *[c_void_p] * 6, c_int64, c_int64, c_float],
    norm_backward=[c_int, *[c_void_p] * 7, c_int64, c_int64],
    swiglu_forward=[c_int, c_void_p, c_void_p, c_int64, c_int64],
    swiglu_backward=[c_int, c_void_p, c_void_p, c_void_p, c_int64, c_int64],
    split_rotate=[c_int, *[c_void_p] * 6, *[c_int64] * 4],
    join_rotate=[c_int, *[c_void_p] * 6, *[c_int64] * 4],
    accumulate=[c_int, c_void_p, c_void_p, c_int64],
    log_softmax=[c_int, *[c_void_p] * 2, *_SIZES],
    logprobs=[c_int, *[c_void_p] * 7, *_SIZES],
    logits_gradient=[c_int, *[c_void_p] * 8, *_SIZES],
    sample=[c_int, *[c_void_p] * 4, *_SIZES],
)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467, eq. 4); [..., D] -> [..., D]."""
    x = x_TD.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return _Norm.apply(x, None, weight_D, eps)
    return norm(x, None, weight_D, eps)[0]


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its RMSNorm."""
    x, delta = x_TD.contiguous(), delta_TD.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad or weight_D.requires_grad):
        return _Norm.apply(x, delta, weight_D, eps)
    out, total, _ = norm(x, delta, weight_D, eps)
    return total, out


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + delta, the sum itself, the norm's scales float32 [T]. No gradient."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    scales = torch.empty(rows, dtype=torch.float32)
    norm_into(x, delta, weight, total, out, scales, eps)
    return out, total, scales


def norm_into(
    x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor, out: Tensor, scales: Tensor, eps: float
) -> None:
    """x + delta into `total` (which may be x), the norm of it into `out`, its scales float32 [T]. No gradient."""
    tensors = addresses(x, delta, weight, total, out, scales)
    _lib.norm_forward(kind_of(x.dtype), *tensors, scales.shape[0], weight.shape[0], eps)


def norm_gradient(
    total_TD: Tensor, weight_D: Tensor, scales_T: Tensor, grad_TD: Tensor, through_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum that was normed (with what comes `through` it) and of the weight, from that of the norm."""
    width = total_TD.shape[-1]
    grad = grad_TD.contiguous()
    through = None if through_TD is None else through_TD.contiguous()
    d_total = torch.empty_like(total_TD)
    slabs = torch.empty(_SLABS, width, dtype=torch.float32)
    tensors = addresses(total_TD, weight_D, scales_T, grad, through, d_total, slabs)
    _lib.norm_backward(kind_of(total_TD.dtype), *tensors, scales_T.shape[0], width)
    return d_total, slabs.sum(0).to(weight_D.dtype)


class _Norm(torch.autograd.Function):
    """The norm of x, or x + delta and the norm of that."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, total, scales = norm(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, scales)
        return out if delta is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        through = grads[0] if len(grads) == 2 else None
        d_total, d_weight = norm_gradient(*ctx.saved_tensors, grads[-1], through)
        return d_total, None if through is None else d_total, d_weight, None


def swiglu(both_TF2: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202) of gate and up side by side: [T, 2 F] -> [T, F]."""
    both = both_TF2.contiguous()
    if torch.is_grad_enabled() and both.requires_grad:
        return _SwiGLU.apply(both)
    return _swiglu(both)


def _swiglu(both: Tensor) -> Tensor:
    out = both.new_empty(both.shape[0], both.shape[1] // 2)
    swiglu_into(both, out)
    return out


def swiglu_into(both_TF2: Tensor, out_TF: Tensor) -> None:
    """swiglu(both) into `out`. No gradient."""
    _lib.swiglu_forward(kind_of(both_TF2.dtype), *addresses(both_TF2, out_TF), *out_TF.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _swiglu(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return swiglu_gradient(ctx.saved_tensors[0], grad)


def swiglu_gradient(both: Tensor, grad: Tensor) -> Tensor:
    """The gradient of gate and up side by side from that of `swiglu`."""
    grad, d_both = grad.contiguous(), torch.empty_like(both)
    _lib.swiglu_backward(kind_of(both.dtype), *addresses(both, grad, d_both), *grad.shape)
    return d_both


def swiglu_linear(both_TF2: Tensor, weight_DF: Tensor) -> Tensor:
    """swiglu(both) @ weight.T, [T, 2 F], [D, F] -> [T, D]; backward computes swiglu again instead of keeping it."""
    return _SwiGLULinear.apply(both_TF2.contiguous(), weight_DF)


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight)
        return F.linear(_swiglu(both), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        both, weight = ctx.saved_tensors
        d_weight = grad.t() @ _swiglu(both) if ctx.needs_input_grad[1] else None
        d_both = swiglu_gradient(both, grad @ weight) if ctx.needs_input_grad[0] else None
        return d_both, d_weight


def split_rotate(
    all_TC: Tensor, cos_Td: Tensor, sin_Td: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, d], k and v [T, K, d] of one product [T, (H + 2 K) d]; q and k turned by cos, sin float32 [T, d / 2].

    Rotary positions pair the halves of a head as Hugging Face does (arXiv 2104.09864, eq. 34).
    """
    x = all_TC.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _SplitRotate.apply(x, cos_Td, sin_Td, heads, kv_heads)
    return split(x, cos_Td, sin_Td, heads, kv_heads)


def split(x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`split_rotate` without a gradient."""
    rows, width = x.shape[0], x.shape[1] // (heads + 2 * kv_heads)
    q = x.new_empty(rows, heads, width)
    k, v = x.new_empty(rows, kv_heads, width), x.new_empty(rows, kv_heads, width)
    _lib.split_rotate(kind_of(x.dtype), *addresses(x, q, k, v, cos, sin), rows, heads, kv_heads, width)
    return q, k, v


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return split(x, cos, sin, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return join_rotate(*grads, *ctx.saved_tensors), None, None, None, None


def join_rotate(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """The gradient of the product that `split_rotate` took apart, from those of its parts."""
    q, k, v = (g.contiguous() for g in (q_THd, k_TKd, v_TKd))
    (rows, heads, width), kv_heads = q.shape, k.shape[1]
    out = q.new_empty(rows, (heads + 2 * kv_heads) * width)
    _lib.join_rotate(kind_of(q.dtype), *addresses(out, q, k, v, cos_Td, sin_Td), rows, heads, kv_heads, width)
    return out


def accumulate_(total: Tensor, part: Tensor) -> Tensor:
    """Add a tensor to one of the same shape that is at least as wide, in place: total.add_(part), in one pass."""
    fits = usable(total) and usable(part) and total.element_size() == 4 and total.shape == part.shape
    if not fits or not (total.is_contiguous() and part.is_contiguous()):
        return total.add_(part)
    _lib.accumulate(kind_of(part.dtype), *addresses(total, part), total.numel())
    return total


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
