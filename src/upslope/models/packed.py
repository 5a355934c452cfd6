"""Weights laid out once for many products with few rows, as decoding asks for them.

oneDNN reorders a weight in every product; with eight rows that takes longer than the product. Here a reordered copy is
kept, for the kernels' own product where they can make it (kernels.products), else for oneDNN's. Only bfloat16 on a CPU:
there a row's bits are those of `F.linear`, while float32 products would go through another library. Where `F.linear` is
not oneDNN's either, no copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upslope.kernels.products import Reordered, onednn_bfloat16

__all__ = ["PackedWeights"]


class PackedWeights:
    """Reordered copies by the weights' addresses, made when first used.

    They are copies: `clear` them when the weights have changed. `prepared` is what a network keeps beside them for its
    own use, and goes with them.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor | Reordered]] = {}  # the weight is held: its address stays its own
        self.prepared: Any = None

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        copies = ((copy.weight if isinstance(copy, Reordered) else weight) for weight, copy in self._copies.values())
        return sum(x.numel() * x.element_size() for x in copies)

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()
        self.prepared = None

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
