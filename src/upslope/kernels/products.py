"""Products whose rows have the same bits whatever stands beside them, as training and decoding ask for them.

How many rows they want; our own of few rows; several layers as one product; weights laid out once.

Our own are with a bfloat16 weight that is used again and again, on processors with VDPBF16PS (products.cpp). oneDNN's
are as fast with many rows, not with the few that decoding has: it reorders a weight in every product, which with eight
rows takes longer than the product. So `PackedWeights` keeps a reordered copy, for our own product where we can make it,
else for oneDNN's. Only bfloat16 on a CPU: there a row's bits are those of `F.linear`, while float32 products would go
through another library. Where `F.linear` is not oneDNN's either, no copy is kept.

Layers that read the same rows (q, k, v; gate and up) are one product. Each keeps its own parameter, under the name that
folders and adapters know; the parameters only lie end to end in memory.

Shapes: T rows, D inputs, C outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class PackedWeights:
    """Reordered copies by the weights' addresses, made when first used.

    They are copies: `clear` them when the weights have changed.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor | Reordered]] = {}  # the weight is held: its address stays its own

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        copies = ((copy.weight if isinstance(copy, Reordered) else weight) for weight, copy in self._copies.values())
        return sum(x.numel() * x.element_size() for x in copies)

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    def linear(self, x_TD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
        """F.linear(x, weight, bias), the same bits."""
        return self.product(weight_CD, bias_C)(x_TD)

    def product(self, weight_CD: Tensor, bias_C: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """x -> F.linear(x, weight, bias), the same bits."""
        copied = self.copy(weight_CD)
        if copied is None:
            return lambda x: F.linear(x, weight_CD, bias_C)
        if isinstance(copied, Reordered):
            return lambda x: copied.product(x, bias_C)
        linear = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: linear(x, copied, bias_C, "none", [], "")

    def copy(self, weight_CD: Tensor) -> Reordered | Tensor | None:
        """The weight reordered for the kernels' product or for oneDNN's; None where neither takes it."""
        if weight_CD.dtype != torch.bfloat16 or weight_CD.device.type != "cpu" or not onednn_bfloat16():
            return None
        found = self._copies.get(weight_CD.data_ptr())
        if found is None:
            copied = Reordered.of(weight_CD)
            if copied is None:
                copied = torch.ops.mkldnn._reorder_linear_weight(weight_CD.detach(), None)
            found = self._copies[weight_CD.data_ptr()] = weight_CD, copied
        return found[1]


@torch.no_grad()
def lay_end_to_end(*layers: nn.Module) -> None:
    """Move the weights (and biases) of plain linear layers into one block of memory. Others are left as they are."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if any(p is None or p.device.type == "meta" for p in parameters) or _end_to_end(parameters) is not None:
            continue
        block = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, block.split([p.shape[0] for p in parameters]), strict=True):
            parameter.data = part


def joined_linear(x_TD: Tensor, *layers: nn.Module, packed: PackedWeights | None = None) -> Tensor:
    """[layer(x) for each] side by side, [T, sum of widths]: one product where their weights lie end to end.

    Layers that are not plain (adapters), or whose weights were replaced, are applied one by one. `packed` holds copies
    of the weights for decoding.
    """
    found = joined(*layers)
    if found is None:
        return torch.cat([layer(x_TD) for layer in layers], dim=-1)
    weight, bias = found
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers if bias is not None]
    if torch.is_grad_enabled() and (x_TD.requires_grad or any(p.requires_grad for p in parameters)):
        return _Joined.apply(x_TD, weight, bias, *parameters)
    return F.linear(x_TD, weight, bias) if packed is None else packed.linear(x_TD, weight, bias)


def joined(*layers: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of plain layers as one, where they lie end to end; else None."""
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    weight = _end_to_end([layer.weight for layer in plain]) if len(plain) == len(layers) else None
    biases = [layer.bias for layer in plain if layer.bias is not None]
    bias = _end_to_end(biases) if biases else None
    if weight is None or (biases and (bias is None or len(biases) != len(plain))):
        return None
    return weight, bias


def linear(x_TD: Tensor, layer: nn.Module, packed: PackedWeights | None = None) -> Tensor:
    """layer(x), of a plain linear layer by way of the packed weights where there are any."""
    if packed is None or type(layer) is not nn.Linear or torch.is_grad_enabled():
        return layer(x_TD)
    return packed.linear(x_TD, layer.weight, layer.bias)


def _end_to_end(parts: list[nn.Parameter]) -> Tensor | None:
    """The parts as one tensor without a copy, or None where they do not follow each other in memory."""
    first, rows = parts[0], 0
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous() or part.dtype != first.dtype:
            return None
        end += part.numel() * part.element_size()
        rows += part.shape[0]
    whole = first.detach()
    if whole.untyped_storage().nbytes() < end - whole.untyped_storage().data_ptr():
        return None
    return whole.as_strided((rows, *first.shape[1:]), first.stride())


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rows = [p.shape[0] for p in parameters[: len(parameters) // (1 if bias is None else 2)]]
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        d_x = grad @ weight if ctx.needs_input_grad[0] else None
        d_parts: list[Tensor | None] = [None] * len(needs)
        count = len(ctx.rows)
        if any(needs[:count]):
            d_parts[:count] = (grad.t() @ x).split(ctx.rows)
        if any(needs[count:]):
            d_parts[count:] = grad.sum(0).split(ctx.rows)
        return d_x, None, None, *(d if needed else None for d, needed in zip(d_parts, needs, strict=True))
