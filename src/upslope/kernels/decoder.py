"""All blocks of a decoder for new tokens of cached sequences in one call (decoder.cpp), in bfloat16.

Shapes: T rows, L layers, D width, F feed-forward width, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from upslope.kernels import Functions, addresses
from upslope.kernels.products import Reordered


class DecoderShape(Structure):
    """The sizes of the blocks (d of a head), the eps of their norms, and what scales their scores."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "width", "intermediate", "heads", "kv_heads", "d")),
        *((name, c_float) for name in ("eps", "scale")),
    )


class BlockWeights(NamedTuple):
    """One block: norm weights, those of the heads where there are any, and four products with their biases."""

    first_norm: Tensor
    second_norm: Tensor
    head_norms: tuple[Tensor, Tensor] | None
    attend: tuple[Reordered, Tensor | None]
    out: tuple[Reordered, Tensor | None]
    widen: tuple[Reordered, Tensor | None]
    narrow: tuple[Reordered, Tensor | None]


class KeptRows(NamedTuple):
    """Where each layer's results go, [L, R, .] each, from row `first` on (models/decoder/activations); float32 lse."""

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


_lib = Functions(decode=[c_void_p] * 5)


class DecoderBlocks:
    """The blocks of a decoder, and the norm after the last; their weights are held as they are now."""

    def __init__(self, shape: DecoderShape, blocks: Sequence[BlockWeights], last_norm: Tensor) -> None:
        self.shape, self._held, self._last_norm = shape, list(blocks), last_norm
        self._blocks = (_Block * len(blocks))(*map(_described, blocks))

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
        described = segments.buffer_info()[0], len(segments) // 4, tables.buffer_info()[0]
        call = _Call(rows, *addresses(*room), keys.stride(0), *described)
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


def _described(block: BlockWeights) -> _Block:
    norms = (block.first_norm, block.second_norm, *(block.head_norms or (None, None)))
    products = (block.attend, block.out, block.widen, block.narrow)
    described = (_Product(*addresses(weight.weight, bias), weight.block) for weight, bias in products)
    return _Block(*addresses(*norms), *described)
