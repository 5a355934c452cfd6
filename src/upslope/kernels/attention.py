"""Attention on the CPU over blocks of 64 keys: packed segments, and sequences in a block cache (attention.cpp).

A query's output is the same bits in both, alone and in company. All tensors are contiguous, of one dtype (float32 or
bfloat16); arithmetic is float32.

Shapes: T rows of tokens, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upslope.kernels import Functions, addresses, kind_of

_lib = Functions(
    attention_packed=[c_int, *[c_void_p] * 6, *[c_int64] * 4, c_int, c_float],
    attention_packed_backward=[c_int, *[c_void_p] * 10, *[c_int64] * 4, c_int, c_float],
    attention_paged=[c_int, *[c_void_p] * 6, c_int64, c_void_p, *[c_int64] * 3, c_float],
    attention_step=[
        *(c_int, *[c_void_p] * 3, c_float, *[c_void_p] * 6, c_int64),
        *(*[c_void_p] * 5, c_int64, c_void_p, *[c_int64] * 3, c_float),
    ],
    cache_write=[c_int, *[c_void_p] * 5, c_int64, c_void_p, *[c_int64] * 2, c_int],
)


def describe(segments: Iterable[tuple[int, int, int, int]]) -> array[int]:
    """Segments as the kernels read them: (first row, rows, position of the first, link) of each.

    link: in a packed call the number of the segment it continues, or -1; with a cache where its blocks begin in the
    list of blocks.
    """
    return array("q", [number for segment in segments for number in segment])


def packed_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, segments: array[int], *, causal: bool, scale: float
) -> Tensor:
    """Attention within each segment and what it continues, [T, H, d]; differentiable. The segments cover all T rows."""
    q, k, v = q_THd.contiguous(), k_TKd.contiguous(), v_TKd.contiguous()
    if k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {list(q.shape)} do not fit keys {list(k.shape)} and values {list(v.shape)}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _PackedAttention.apply(q, k, v, segments, causal, scale)
    out = torch.empty_like(q)
    _forward(q, k, v, out, None, segments, causal, scale)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, segments: array[int], causal: bool, scale: float
) -> None:
    tensors = addresses(q, k, v, out, lse)
    _lib.attention_packed(kind_of(q.dtype), *tensors, *_described(segments), *_sizes(q, k), causal, scale)


def _described(segments: array[int]) -> tuple[int, int]:
    return segments.buffer_info()[0], len(segments) // 4


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """H, K, d; of keys in blocks [., K, 64, d], too."""
    return q.shape[1], k.shape[1], q.shape[2]


class _PackedAttention(torch.autograd.Function):
    """With FlashAttention's backward pass (arXiv 2205.14135, appendix B): no probability is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: array[int], causal: bool, scale: float) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        _forward(q, k, v, out, lse, segments, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = segments, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *packed_attention_gradient(*ctx.saved_tensors, grad, *ctx.options), None, None, None


def packed_attention_gradient(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    out_THd: Tensor,
    lse_TH: Tensor,
    grad_THd: Tensor,
    segments: array[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from that of the output; lse_TH float32 is the forward pass's."""
    grad = grad_THd.contiguous()
    grads = torch.empty_like(q_THd), torch.empty_like(k_TKd), torch.empty_like(v_TKd)
    tensors = addresses(q_THd, k_TKd, v_TKd, out_THd, lse_TH, grad, *grads)
    sizes = _sizes(q_THd, k_TKd)
    _lib.attention_packed_backward(kind_of(q_THd.dtype), *tensors, *_described(segments), *sizes, causal, scale)
    return grads


def write_cache(
    k_TKd: Tensor,
    v_TKd: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: array[int],
    blocks: array[int],
    *,
    by_column: bool,
) -> None:
    """Put keys and values into their places in one layer's blocks [., K, 64, d].

    by_column: the keys of a block as its columns [d, 64], as `paged_attention` reads them.
    """
    k, v = k_TKd.contiguous(), v_TKd.contiguous()
    if not k.shape[1:] == v.shape[1:] == (keys.shape[1], keys.shape[3]):
        raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} do not fit blocks {list(keys.shape)}")
    tensors, tables = addresses(k, v, keys, values), blocks.buffer_info()[0]
    _lib.cache_write(kind_of(k.dtype), *tensors, *_described(segments), tables, *k.shape[1:], by_column)


def paged_attention(
    q_THd: Tensor, keys: Tensor, values: Tensor, segments: array[int], blocks: array[int], *, scale: float
) -> Tensor:
    """Attention of each query to everything up to itself in one layer's blocks; [T, H, d].

    A block's values are [K, 64, d] of `values`, its keys [K, d, 64] in the same memory of `keys`.
    """
    q = q_THd.contiguous()
    if q.shape[2] != keys.shape[3] or q.shape[1] % keys.shape[1]:
        raise ValueError(f"queries {list(q.shape)} do not fit blocks {list(keys.shape)}")
    out = torch.empty_like(q)
    tensors, tables = addresses(q, keys, values, out, None), blocks.buffer_info()[0]
    _lib.attention_paged(kind_of(q.dtype), *tensors, *_described(segments), tables, *_sizes(q, keys), scale)
    return out


def attention_step(
    all_TC: Tensor,
    out_TC: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: array[int],
    blocks: array[int],
    *,
    qkv: tuple[Tensor, Tensor, Tensor],
    angles: tuple[Tensor, Tensor],
    scale: float,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    lse_TH: Tensor | None = None,
) -> None:
    """`rows.split_rotate`, `write_cache` by column and `paged_attention` in one call, into `out` [., H d].

    qkv is room for q [T, H, d], k and v [T, K, d]; of `all` and `out` the first T rows are used. angles: cos and sin
    [T, d / 2]. norms: weights [d] of the norms of queries and keys before they are turned, which change `all`.
    lse_TH takes the log-sum-exp of each row's scores, float32.
    """
    q, k, v = qkv
    scales = torch.empty(q.shape[1], dtype=torch.float32)
    before, tables = addresses(all_TC, *(norms or (None, None))), blocks.buffer_info()[0]
    room, cached = addresses(scales, q, k, v, *angles), addresses(keys, values, out_TC, lse_TH)
    sizes = *_described(segments), tables, *_sizes(q, k)
    _lib.attention_step(kind_of(q.dtype), *before, eps, *room, q.shape[0], *cached, *sizes, scale)
