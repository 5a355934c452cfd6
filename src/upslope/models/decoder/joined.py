"""Linear layers that read the same rows as one matrix product: q, k, v; gate and up.

Each keeps its own parameter, under the name that folders and adapters know; the parameters only lie end to end in
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from upslope.models.packed import PackedWeights

__all__ = ["joined", "joined_linear", "lay_end_to_end", "linear"]


@torch.no_grad()
def lay_end_to_end(*layers: nn.Module) -> None:
    """Move the weights (and biases) of plain linear layers into one block of memory. Others are left as they are."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        if any(p is None or p.device.type == "meta" for p in parameters) or _block(parameters) is not None:
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
    weight = _block([layer.weight for layer in plain]) if len(plain) == len(layers) else None
    biases = [layer.bias for layer in plain if layer.bias is not None]
    bias = _block(biases) if biases else None
    if weight is None or (biases and (bias is None or len(biases) != len(plain))):
        return None
    return weight, bias


def linear(x_TD: Tensor, layer: nn.Module, packed: PackedWeights | None = None) -> Tensor:
    """layer(x), of a plain linear layer by way of the packed weights where there are any."""
    if packed is None or type(layer) is not nn.Linear or torch.is_grad_enabled():
        return layer(x_TD)
    return packed.linear(x_TD, layer.weight, layer.bias)


def _block(parts: list[nn.Parameter]) -> Tensor | None:
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
