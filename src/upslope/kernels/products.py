"""Products whose rows have the same bits whatever stands beside them: how many rows they want, and our own of few rows.

Our own are with a bfloat16 weight that is used again and again, on processors with VDPBF16PS (products.cpp). oneDNN's
are as fast with many rows, not with the few that decoding has. Shapes: T rows, D inputs, C outputs.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from upslope.kernels import Functions, addresses, usable

_COLUMNS = 32  # of a group, as in products.cpp
_STRIDE = 64  # boundaries of blocks are multiples of it
_ROWS = 64  # of the products that are compared
_BIG = 2.0**13  # its square swallows a 1
_lib = Functions(
    product_usable=[c_void_p],
    product_reorder=[c_void_p, c_void_p, c_int64, c_int64],
    product=[*[c_void_p] * 4, *[c_int64] * 4],
)


def padded_row_count(rows: int) -> int:
    """The smallest number of rows >= `rows` at which a CPU's matrix product does not depend on the number of rows.

    In float32 the products of 4, 8, and 12 or more rows agree bit for bit row by row; other counts below 12 go
    through kernels that add in another order. In bfloat16 every count agrees, from `least_rows` on.
    """
    return rows if rows >= 12 else max(4, -(-rows // 4) * 4)


def least_rows(elements: int) -> int:
    """Rows from which products with a matrix of so many elements take one kernel in bfloat16, whatever their number.

    Products of up to 16^3 multiplications go another way, which adds in another order; this concerns tiny matrices.
    """
    return 16**3 // max(1, elements) + 1


def pad_rows(x: Tensor, *, least: int = 4) -> Tensor:
    """Zero rows appended to the first dimension up to `padded_row_count`, and up to `least`."""
    extra = padded_row_count(max(x.shape[0], least)) - x.shape[0]
    return torch.cat([x, x.new_zeros(extra, *x.shape[1:])]) if extra else x


@cache
def onednn_bfloat16() -> bool:
    """Whether oneDNN makes torch's bfloat16 products here; elsewhere loops of torch's own do, the same bits row by row.

    torch is asked, not the processor (AVX-512, AVX-NE-CONVERT, Arm's BF16): ONEDNN_MAX_CPU_ISA takes instructions away.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Reordered:
    """A copy of a weight [C, D] whose product has the bits of `F.linear`, laid out [C / 32, D / 2, 32, 2]."""

    def __init__(self, weight_CD: Tensor, block: int) -> None:
        weight = weight_CD.detach().contiguous()
        self.outputs, self.inputs = weight.shape
        self.block = block
        groups = -(-self.outputs // _COLUMNS)
        self.weight = torch.empty(groups, self.inputs // 2, _COLUMNS, 2, dtype=weight.dtype)
        _lib.product_reorder(*addresses(weight, self.weight), self.outputs, self.inputs)

    @classmethod
    def of(cls, weight_CD: Tensor) -> Reordered | None:
        """The weight reordered; None where it is not bfloat16, this processor cannot, or the bits would be others."""
        if weight_CD.dtype != torch.bfloat16 or not usable(weight_CD) or not _has_instruction():
            return None
        block = _block(*weight_CD.shape)
        return None if block is None else cls(weight_CD, block)

    def product(self, x_TD: Tensor, bias_C: Tensor | None = None) -> Tensor:
        """F.linear(x, weight, bias): [T, D] -> [T, C], without a gradient."""
        x = x_TD.contiguous()
        if x.dim() != 2 or x.shape[1] != self.inputs or x.dtype != self.weight.dtype:
            raise ValueError(f"x {list(x.shape)} in {x.dtype} does not fit a weight of {self.inputs} inputs")
        out = x.new_empty(x.shape[0], self.outputs)
        tensors = addresses(x, self.weight, bias_C, out)
        _lib.product(*tensors, x.shape[0], self.outputs, self.inputs, self.block)
        return out


@cache
def _has_instruction() -> bool:
    answer = c_int64()
    _lib.product_usable(ctypes.byref(answer))
    return bool(answer.value)


@cache
def _block(outputs: int, inputs: int) -> int | None:
    """How many inputs torch's product of this shape adds up before it adds that to the rest; None where it is unlike.

    Found by asking it: a row holds +2^13 at the second place of a stride, -2^13 at that of the next (the second of a
    pair is added first) and a 1 beside it, all times weights that make them +2^26, -2^26 and 1. The 1 gets lost where
    a block begins with that pair. Then rows in which large numbers cancel each other, so that every change of the
    order shows in what is left, must give the same bits.
    """
    if inputs % 2:
        return None
    starts = range(_STRIDE, inputs - 1, _STRIDE)
    weight = torch.ones(inputs)
    x = torch.zeros(max(len(starts), _ROWS), inputs)
    for row, start in enumerate(starts):
        weight[[start - _STRIDE + 1, start + 1]] = _BIG
        x[row, start - _STRIDE + 1], x[row, start + 1], x[row, start] = _BIG, -_BIG, 1
    with torch.no_grad():
        lost = F.linear(x.bfloat16(), weight.bfloat16().repeat(outputs, 1))[: len(starts), 0] == 0
        found = [start for start, is_lost in zip(starts, lost.tolist(), strict=True) if is_lost]
        block = found[0] if found else inputs
        if found != [*range(block, starts.stop, block)]:
            return None
        generator = torch.Generator().manual_seed(inputs)
        large = torch.rand(inputs, generator=generator) < 0.2
        x = torch.randint(-3, 4, (_ROWS, inputs), generator=generator).float()
        signs = torch.arange(int(large.sum())) % 2 * 2.0 - 1
        signs[: len(signs) % 2] = 0  # as many + as -
        for row in x:
            row[large] = _BIG * signs[torch.randperm(len(signs), generator=generator)]
        weight = torch.where(large, _BIG, 1.0).bfloat16().repeat(outputs, 1)
        same = torch.equal(Reordered(weight, block).product(x.bfloat16()), F.linear(x.bfloat16(), weight))
    return block if same else None
