"""Attention on a GPU: packed segments by torch's flex_attention, cached sequences by kernels.paged_triton.

What a packed token may see is a mask of its own segment and the one that this continues; which tiles of 128 x 128 have
anything to compute is known from the segments, so a shared prompt lies there once and is read by all that continue it.
FlexAttention: Dong et al. 2024, arXiv 2412.05496.

Shapes: T packed tokens, H query heads, K key/value heads, d head width, S sequences, n tiles.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upslope.models.protocol import Segment

TILE = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_on(x: Tensor) -> bool:
    """Whether the fused attention of a GPU takes this tensor: on CUDA, with Triton, not in float64."""
    return x.is_cuda and x.dtype in _DTYPES and fused_attention()


@cache
def fused_attention() -> bool:
    """Whether a GPU's fused attention can be used here: Triton is installed."""
    return find_spec("triton") is not None


class PackedFlex:
    """The segments of a PackedContext as a block mask; differentiable. Off CUDA it runs unfused, for tests."""

    def __init__(self, segments: Sequence[Segment], *, causal: bool, device: torch.device | str) -> None:
        from torch.nn.attention.flex_attention import BlockMask  # takes a second: only where it is used

        self.total = segments[-1].row + segments[-1].count
        self.extra = -self.total % TILE
        # what fills the last tile up is a segment of its own, so that every row sees something
        filled = [*segments, Segment(self.total, self.extra, 0)] if self.extra else list(segments)
        counts = torch.tensor([s.count for s in filled])
        own = torch.arange(len(filled)).repeat_interleave(counts).to(device)
        parent = torch.tensor([s.parent for s in filled]).repeat_interleave(counts).to(device)
        place = torch.cat([torch.arange(s.start, s.start + s.count) for s in filled]).to(device)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            related = (own[q] == own[k]) | (parent[q] == own[k])
            return related & (place[k] <= place[q]) if causal else related

        some, every = _tiles(filled, causal=causal)
        partial = _ordered(some & ~every)
        full = _ordered(every)
        self.mask = BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(self.total + self.extra,) * 2
        ).to(device)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Attention within each segment and what it continues, [T, H, d]."""
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, self.extra)).transpose(0, 1)[None] for x in (q_THd, k_TKd, v_TKd))
        out = _flex_attention(compiled=q.is_cuda)(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)[: self.total]


class PagedTiles:
    """The new tokens of a PagedContext in tiles of consecutive tokens of one sequence, and its block tables."""

    def __init__(
        self, tables: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
        width = max(map(len, tables))
        self.tables_SB = torch.tensor([[*t, *[0] * (width - len(t))] for t in tables], dtype=torch.int32).to(device)
        self._columns = tuple(starts), tuple(counts)
        self._tiles: dict[int, Tensor] = {}

    def attend(self, q_THd: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention to everything up to each query in one layer's blocks [., K, BLOCK, d]; [T, H, d]."""
        from upslope.kernels.paged_triton import paged_attention_gpu, tile_tokens

        longest = min(tile_tokens(q_THd.shape[1], keys.shape[1]), max(self._columns[1]))
        tiles = self._tiles.get(longest)
        if tiles is None:
            tiles = self._tiles[longest] = self._tiles_of(longest).to(q_THd.device)
        return paged_attention_gpu(q_THd, keys, values, self.tables_SB, tiles, scale=scale, longest=longest)

    def _tiles_of(self, longest: int) -> Tensor:
        """int32 [n, 4]: sequence, row of the call, position in the sequence, number of tokens."""
        found, row = [], 0
        for sequence, (start, count) in enumerate(zip(*self._columns, strict=True)):
            for offset in range(0, count, longest):
                found.append([sequence, row + offset, start + offset, min(longest, count - offset)])
            row += count
        return torch.tensor(found, dtype=torch.int32)


@cache
def _flex_attention(*, compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _tiles(segments: Sequence[Segment], *, causal: bool) -> tuple[Tensor, Tensor]:
    """Which key tiles the rows of a query tile see something of, and which all of them see whole: two bool [n, n]."""
    count = -(-(segments[-1].row + segments[-1].count) // TILE)
    some = torch.zeros(count, count, dtype=torch.bool)
    whole = torch.zeros(count, count, dtype=torch.int32)
    members = torch.zeros(count, 1, dtype=torch.int32)
    for s in segments:
        for tile in range(s.row // TILE, (s.row + s.count - 1) // TILE + 1):
            first, end = max(s.row, tile * TILE), min(s.row + s.count, (tile + 1) * TILE)
            members[tile] += 1
            spans = [(s.row, end, first + 1) if causal else (s.row, s.row + s.count, s.row + s.count)]
            if s.parent != -1:
                p = segments[s.parent]
                spans.append((p.row, p.row + p.count, p.row + p.count))
            for low, high, seen_by_all in spans:
                some[tile, low // TILE : (high - 1) // TILE + 1] = True
                whole[tile, -(-low // TILE) : seen_by_all // TILE] += 1
    return some, whole == members


def _ordered(tiles_nn: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles are set in each row, and the numbers of the set ones, in order, before all others; int32."""
    counts = tiles_nn.sum(1, dtype=torch.int32)
    order = torch.argsort((~tiles_nn).to(torch.uint8), dim=1, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]
