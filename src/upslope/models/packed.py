"""Weights laid out once for many products with few rows, as decoding asks for them.

oneDNN reorders a weight in every product; with eight rows that takes longer than the product. Here the reordered copy
is kept. Only bfloat16 on a CPU: there a row's bits are those of `F.linear`, while float32 products would go through
another library.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PackedWeights"]


class PackedWeights:
    """Reordered copies by the weights' addresses, made when first used.

    They are copies: `clear` them when the weights have changed.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # the weight is held too: its address stays its own

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(weight.numel() * weight.element_size() for weight, _ in self._copies.values())

    def clear(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    def linear(self, x_TD: Tensor, weight_CD: Tensor, bias_C: Tensor | None = None) -> Tensor:
        """F.linear(x, weight, bias), the same bits."""
        usable = weight_CD.dtype == torch.bfloat16 and weight_CD.device.type == "cpu"
        if not usable or not torch.backends.mkldnn.is_available():
            return F.linear(x_TD, weight_CD, bias_C)
        found = self._copies.get(weight_CD.data_ptr())
        if found is None:
            found = weight_CD, torch.ops.mkldnn._reorder_linear_weight(weight_CD.detach(), None)
            self._copies[weight_CD.data_ptr()] = found
        return torch.ops.mkldnn._linear_pointwise(x_TD, found[1], bias_C, "none", [], "")
