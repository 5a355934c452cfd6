"""Attention over blocks of 64 keys, causal or not, one arithmetic for training, scoring, prefill and decoding.

The sum over keys always runs block by block with a float32 running maximum, normaliser and accumulator, so that a
query's output is the same number, bit for bit, whether it is computed alone from the cache (decode), in a packed
batch (training) or behind a shared prompt. Here stands which rows are queries and keys of a call. The arithmetic is
in kernels.attention for float32 and bfloat16 on a CPU, in models.attention.padded everywhere but on a GPU.

There it is fast, but not of the same bits in training and decoding: packed segments by torch's flex_attention, cached
sequences by kernels.paged_triton. What a packed token may see is a mask of its own segment and the one that this
continues; which tiles of 128 x 128 have anything to compute is known from the segments, so a shared prompt lies there
once and is read by all that continue it. FlexAttention: Dong et al. 2024, arXiv 2412.05496.

Shapes: L layers, T packed tokens, H query heads, K key/value heads, d head width, S sequences.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upslope.kernels import usable
from upslope.kernels.attention import describe, packed_attention, paged_attention, write_cache
from upslope.kernels.products import PackedWeights
from upslope.models.attention.padded import BLOCK, PackedBuckets, PagedBuckets
from upslope.models.protocol import Context, ModelSpec, Segment

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
        tiles = *_ordered(some & ~every), *_ordered(every)
        self.mask = BlockMask.from_kv_blocks(
            *tiles, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(self.total + self.extra,) * 2
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


class KVCache:
    """Keys and values of every layer in blocks of 64 tokens: [L, blocks, K, BLOCK, d].

    Where the CPU kernels attend, they keep the keys of a block as its columns, [d, BLOCK] in the same memory.
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, BLOCK, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_block(spec: ModelSpec, dtype: torch.dtype) -> int:
        """Memory of one block over all layers, keys and values."""
        return 2 * spec.num_layers * spec.num_kv_heads * BLOCK * spec.head_dim * dtype.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in every layer: copy-on-write of partly filled shared ones. No target is a source."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.keys.device).unbind(1)
        self.keys.index_copy_(1, targets, self.keys.index_select(1, sources))
        self.values.index_copy_(1, targets, self.values.index_select(1, sources))


class PackedContext(Context):
    """Segments laid end to end without padding; positions start at 0 in each sequence. Differentiable.

    `lengths[i]` tokens belong to segment i. It is a sequence of its own, or continues segment `parents[i]` (a prompt
    that several continuations share: its tokens are computed once and seen by all of them, its gradient is the sum of
    theirs). Each token attends to its own segment and what that continues, up to itself, or with causal=False to the
    whole of its segment (which may then continue none). ValueError: an empty segment, or one that cannot continue what
    it should.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        parents: Sequence[int] | None = None,
        *,
        causal: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every packed sequence needs at least one token, got lengths {list(lengths)}")
        parents = [-1] * len(lengths) if parents is None else list(parents)
        for i, (p, _) in enumerate(zip(parents, lengths, strict=True)):
            if p != -1 and not (0 <= p < len(lengths) and parents[p] == -1 and p != i):
                raise ValueError(f"segment {i} cannot continue segment {p}: it must be a segment that continues none")
        if not causal and max(parents) != -1:
            raise ValueError("no segment can continue another where every token sees the whole of its own (not causal)")
        self.lengths, self.parents, self.causal, self.device = tuple(lengths), tuple(parents), causal, device
        starts = [0 if p == -1 else lengths[p] for p in parents]
        ends = accumulate(lengths)
        self.segments = tuple(
            Segment(end - n, n, s, p) for end, n, s, p in zip(ends, lengths, starts, parents, strict=True)
        )
        self.positions_T = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).to(device)

    @cached_property
    def described(self) -> array[int]:
        """The segments as the kernels read them."""
        return describe((s.row, s.count, s.start, s.parent) for s in self.segments)

    @cached_property
    def _buckets(self) -> PackedBuckets:
        return PackedBuckets(self.lengths, self.parents, causal=self.causal, device=self.device)

    @cached_property
    def _flex(self) -> PackedFlex:
        return PackedFlex(self.segments, causal=self.causal, device=self.device)

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Attention within each sequence; `layer` is not needed here."""
        _check_rows(self.positions_T.shape[0], q_THd, k_TKd, v_TKd)
        if usable(q_THd, k_TKd, v_TKd):
            return packed_attention(q_THd, k_TKd, v_TKd, self.described, causal=self.causal, scale=scale)
        if fused_on(q_THd):
            return self._flex.attend(q_THd, k_TKd, v_TKd, scale)
        return self._buckets.attend(q_THd, k_TKd, v_TKd, scale)


def _check_rows(total: int, *tensors: Tensor) -> None:
    if any(x.shape[0] != total for x in tensors):
        raise ValueError(f"the call has {total} tokens, its queries, keys and values {[x.shape[0] for x in tensors]}")


class PagedContext(Context):
    """New tokens of sequences whose earlier keys and values lie in a block cache. Not differentiable.

    Sequence i has `starts[i]` tokens in the cache and brings `counts[i]` new ones, laid end to end in the call;
    `tables[i]` lists its block ids and must cover starts[i] + counts[i] tokens. Blocks before the first new token may
    be shared between sequences; the blocks written to may not. `prompts[i]`, where given, is the number of tokens of
    the sequence's prompt, which a network that treats prompts apart needs to know. `packed`: copies
    of the weights for decoding. `blocks`: all tables as the kernels read them.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        prompts: Sequence[int] | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        for i, (table, start, count) in enumerate(zip(tables, starts, counts, strict=True)):
            if count < 1 or start < 0 or len(table) * BLOCK < start + count:
                raise ValueError(
                    f"sequence {i}: {len(table)} blocks of {BLOCK} cannot hold {start} cached + {count} new tokens"
                )
        self.cache, self.packed = cache, packed
        self._starts, self._counts, self._prompts = tuple(starts), tuple(counts), prompts
        self._tables = [table[: -(-(s + n) // BLOCK)] for table, s, n in zip(tables, starts, counts, strict=True)]
        used = [*chain.from_iterable(self._tables)]
        if not 0 <= min(used) <= max(used) < cache.num_blocks:
            raise ValueError(
                f"the cache has blocks 0 to {cache.num_blocks - 1}, the tables name {min(used)}, {max(used)}"
            )
        self.blocks = array("q", used)
        positions = chain.from_iterable(range(s, s + n) for s, n in zip(starts, counts, strict=True))
        self.positions_T = torch.tensor([*positions], device=cache.keys.device)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The sequences' new rows."""
        known = [None] * len(self._starts) if self._prompts is None else self._prompts
        columns = zip(self._rows, self._counts, self._starts, known, strict=True)
        return tuple(Segment(row, n, s, prompt=p) for row, n, s, p in columns)

    @property
    def _rows(self) -> list[int]:
        return [end - n for end, n in zip(accumulate(self._counts), self._counts, strict=True)]

    @cached_property
    def described(self) -> array[int]:
        """The segments as the kernels read them."""
        first_block = accumulate((len(table) for table in self._tables), initial=0)
        return describe(zip(self._rows, self._counts, self._starts, first_block, strict=False))

    @cached_property
    def _laid_out(self) -> PagedBuckets | PagedTiles:
        kind = PagedTiles if fused_on(self.cache.keys) else PagedBuckets
        return kind(self._tables, self._starts, self._counts, self.cache.keys.device)

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """Block and place in it of every row of the call."""
        columns = zip(self._tables, self._starts, self._counts, strict=True)
        blocks = [table[p // BLOCK] for table, s, n in columns for p in range(s, s + n)]
        return torch.tensor(blocks, device=self.positions_T.device), self.positions_T % BLOCK

    @cached_property
    def _slots_before(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block and place of the token before each sequence's first row, and whether there is none."""
        columns = zip(self._tables, self._starts, strict=True)
        last = [(table[(s - 1) // BLOCK], (s - 1) % BLOCK, 0) if s else (0, 0, 1) for table, s in columns]
        block, place, begins = torch.tensor(last, device=self.positions_T.device).unbind(1)
        return block, place, begins.bool()

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Put the call's keys and values of `layer` into the cache, for `before`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if usable(k_TKd, v_TKd, keys):
            _check_rows(self.positions_T.shape[0], k_TKd, v_TKd)
            write_cache(k_TKd, v_TKd, keys, values, self.described, self.blocks, by_column=False)
        else:
            keys[self._slots[0], :, self._slots[1]] = k_TKd
            values[self._slots[0], :, self._slots[1]] = v_TKd

    def before(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value [S, K, d] of the token before each sequence's first new one; zeros where there is none.

        Those that `write` kept; what `attend` keeps is its own.
        """
        block, place, begins = self._slots_before
        keys, values = (x[layer][block, :, place] for x in (self.cache.keys, self.cache.values))
        return keys.masked_fill(begins[:, None, None], 0), values.masked_fill(begins[:, None, None], 0)

    @torch.no_grad()
    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Put the new keys and values of `layer` into the cache, then attend to everything up to each query."""
        _check_rows(self.positions_T.shape[0], q_THd, k_TKd, v_TKd)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if usable(q_THd, k_TKd, v_TKd, keys):
            write_cache(k_TKd, v_TKd, keys, values, self.described, self.blocks, by_column=True)
            return paged_attention(q_THd, keys, values, self.described, self.blocks, scale=scale)
        self.write(layer, k_TKd, v_TKd)
        return self._laid_out.attend(q_THd, keys, values, scale)
