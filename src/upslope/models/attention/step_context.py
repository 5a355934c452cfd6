"""The context of a decoding step whose tensors stay where they are, so that a captured CUDA graph can be replayed.

Shapes: T rows, one token of one sequence each, H query heads, K key/value heads, d head width, B blocks of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.protocol import Segment

__all__ = ["StepContext"]


class StepContext:
    """One new token for each of T sequences: positions int64 [T], and the cache's blocks int32 [T, B] of each.

    What the tensors hold when a call runs counts, not what they held when this was made. Not differentiable.
    """

    packed = None

    def __init__(self, cache: KVCache, positions_T: Tensor, tables_TB: Tensor) -> None:
        self.cache, self.positions_T, self.tables_TB = cache, positions_T, tables_TB
        rows = torch.arange(len(positions_T), dtype=torch.int32, device=positions_T.device)
        self.tiles_T4 = torch.stack([rows, rows, positions_T.to(torch.int32), torch.ones_like(rows)], dim=1)
        self.blocks_T = tables_TB.gather(1, (positions_T // BLOCK)[:, None])[:, 0].long()
        self.places_T = positions_T % BLOCK

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Not known here: they would have to be read back from the device."""
        raise TypeError("the segments of a captured step are not known to the host")

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Put the call's keys and values of `layer` into the cache."""
        self.cache.keys[layer][self.blocks_T, :, self.places_T] = k_TKd
        self.cache.values[layer][self.blocks_T, :, self.places_T] = v_TKd

    def before(self, layer: int) -> tuple[Tensor, Tensor]:
        """Not offered: no network that can be captured asks for it."""
        raise TypeError("a captured step does not keep what stands before it")

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Put the new keys and values of `layer` into the cache, then attend to everything up to each query."""
        from upslope.kernels.paged_triton import paged_attention_gpu

        self.write(layer, k_TKd, v_TKd)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return paged_attention_gpu(q_THd, keys, values, self.tables_TB, self.tiles_T4, scale=scale, longest=1)
