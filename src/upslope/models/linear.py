"""Linear layers as training and decoding ask for them: several as one product, and weights laid out once.

Layers that read the same rows (q, k, v; gate and up) are one product. Each keeps its own parameter, under the name that
folders and adapters know; the parameters only lie end to end in memory.

Decoding has few rows a product. oneDNN reorders a weight in every product; with eight rows that takes longer than the
product. Here a reordered copy is kept, for the kernels' own product where they can make it (kernels.products), else for
oneDNN's. Only bfloat16 on a CPU: there a row's bits are those of `F.linear`, while float32 products would go through
another library. Where `F.linear` is not oneDNN's either, no copy is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from upslope.kernels.products import Reordered, onednn_bfloat16


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
