"""Attention on the CPU over blocks of 64 keys: packed segments, and sequences in a block cache (attention.cpp).

A query's output is the same bits in both, alone and in company. All tensors are contiguous, of one dtype (float32 or
bfloat16); arithmetic is float32. Around attention, all blocks of a decoder for new tokens of cached sequences in one
call (decoder.cpp), in bfloat16.

Shapes: T rows of tokens, L layers, D width, F feed-forward width, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upslope.kernels import Functions, addresses, kind_of
from upslope.kernels.products import Reordered

_lib = Functions(
    attention_packed=[c_int, *[c_void_p] * 6, *[c_int64] * 4, c_int, c_float],
    attention_packed_backward=[c_int, *[c_void_p] * 10, *[c_int64] * 4, c_int, c_float],
    attention_paged=[c_int, *[c_void_p] * 6, c_int64, c_void_p, *[c_int64] * 3, c_float],
    attention_step=[
        *(c_int, *[c_void_p] * 3, c_float, *[c_void_p] * 6, c_int64),
        *(*[c_void_p] * 5, c_int64, c_void_p, *[c_int64] * 3, c_float),
    ],
    cache_write=[c_int, *[c_void_p] * 5, c_int64, c_void_p, *[c_int64] * 2, c_int],
    decode=[c_void_p] * 5,
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


class DecoderShape(Structure):
    """The sizes of the blocks (d of a head), the eps of their norms, and what scales their scores."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "width", "intermediate", "heads", "kv_heads", "d")),
        *((name, c_float) for name in ("eps", "scale")),
    )


Product = TypeVar("Product")
Weight = tuple[Reordered, Tensor | None]
"""A product's weight, and its bias."""


class BlockWeights(NamedTuple, Generic[Product]):
    """One block: norm weights, those of the heads where there are any, and what its four products are made with."""

    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    attend: Product
    out: Product
    widen: Product
    narrow: Product


class KeptRows(NamedTuple):
    """Where each layer's results go, [L, R, .] each, from row `first` on (models/decoder/fast.py); float32 lse."""

    products: Tensor
    attended: Tensor
    middle: Tensor
    gates: Tensor
    ends: Tensor
    lse: Tensor
    first: int


class _Product(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("block", c_int64))


class _Block(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("first_norm", "second_norm", "q_norm", "k_norm")),
        *((name, _Product) for name in ("attend", "out", "widen", "narrow")),
    )


class _Call(Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, c_void_p) for name in ("x", "normed", "delta", "gated", "q", "k", "v", "scales", "cosine", "sine")),
        *((name, c_void_p) for name in ("keys", "values")),
        ("cache_stride", c_int64),
        ("segments", c_void_p),
        ("size", c_int64),
        ("tables", c_void_p),
    )


class _Results(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("products", "attended", "middle", "gates", "ends", "lse")),
        *((f"{name}_stride", c_int64) for name in ("products", "attended", "middle", "gates", "ends", "lse")),
    )


class DecoderBlocks:
    """The blocks of a decoder, and the norm after the last; their weights are held as they are now."""

    def __init__(self, shape: DecoderShape, blocks: Sequence[BlockWeights[Weight]], last_norm: Tensor) -> None:
        self.shape, self._held, self._last_norm = shape, list(blocks), last_norm
        self._blocks = (_Block * len(blocks))(*map(_in_c, blocks))

    def run(
        self,
        x_TD: Tensor,
        angles_Td: tuple[Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        segments: array[int],
        tables: array[int],
        kept: KeptRows | None = None,
    ) -> Tensor:
        """Normed hidden states [T, D] of embedded tokens x (overwritten).

        keys, values: the cache [L, ., K, 64, d]; segments and tables as `kernels.attention.attention_step` reads them;
        angles: cosines and sines [T, d / 2], float32.
        """
        s, rows = self.shape, x_TD.shape[0]
        if x_TD.dtype != torch.bfloat16 or x_TD.shape[1] != s.width or keys.shape[0] != s.layers:
            raise ValueError(f"x {list(x_TD.shape)} in {x_TD.dtype}, cache {list(keys.shape)}: not of this decoder")
        cosine, sine = angles_Td
        normed, delta = torch.empty_like(x_TD), torch.empty_like(x_TD)
        gated = x_TD.new_empty(rows, s.intermediate)
        q, k, v = (x_TD.new_empty(rows, n * s.d) for n in (s.heads, s.kv_heads, s.kv_heads))
        scales = torch.empty(max(rows, s.heads), dtype=torch.float32)
        room = (x_TD, normed, delta, gated, q, k, v, scales, cosine, sine, keys, values)
        call = _Call(rows, *addresses(*room), keys.stride(0), *_described(segments), tables.buffer_info()[0])
        if kept is None:
            products = x_TD.new_empty(rows, (s.heads + 2 * s.kv_heads) * s.d)
            attended = x_TD.new_empty(rows, s.heads * s.d)
            gates = x_TD.new_empty(rows, 2 * s.intermediate)
            results = _Results(*addresses(products, attended, x_TD, gates, x_TD))
        else:
            stores = kept[:-1]
            starts = (x.data_ptr() + kept.first * x.stride(1) * x.element_size() for x in stores)
            results = _Results(*starts, *(x.stride(0) for x in stores))
        structures = map(ctypes.addressof, (s, call, results))
        _lib.decode(ctypes.addressof(self._blocks), self._last_norm.data_ptr(), *structures)
        return normed


def _in_c(block: BlockWeights[Weight]) -> _Block:
    norms = (block.first_norm, block.second_norm, *(block.head_norms or (None, None)))
    products = (block.attend, block.out, block.widen, block.narrow)
    described = (_Product(*addresses(weight.weight, bias), weight.block) for weight, bias in products)
    return _Block(*addresses(*norms), *described)
