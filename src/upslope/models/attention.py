"""Attention over blocks of 64 keys, causal or not, one code path for training, scoring, prefill and decoding.

The sum over keys always runs block by block with a float32 running maximum, normaliser and accumulator, so that a
query's output is the same number, bit for bit, whether it is computed alone from the cache (decode), in a packed
batch (training) or behind a shared prompt. A block that is masked as a whole leaves every bit as it was. That
arithmetic is in models.block_softmax; here stands which rows are queries and keys of a call.

Shapes: T packed tokens, H query heads, K key/value heads, g = H / K query heads per key head, d head width,
B sequences of one bucket, R query rows of one (sequence, key head): position-major, then the g heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from upslope.models.block_softmax import BLOCK, BlockAttention, Plan, attend_blocks, causal_plan, whole_plan
from upslope.models.protocol import ModelSpec, Segment

__all__ = ["BLOCK", "KVCache", "PackedContext", "PagedContext"]


class KVCache:
    """Keys and values of every layer in blocks of 64 tokens: [L, blocks, K, BLOCK, d]."""

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

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in every layer (copy-on-write of a partly filled shared block)."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences of like shape: where their new tokens lie in the call, and back.

    queries [B * Q]: row of the call for each padded query slot (the row T, a zero row, for padding). rows, slots [n]:
    row in the call and padded query slot of each real token. counts, starts, blocks: new tokens, first query position
    and number of key blocks of each sequence.
    """

    size: int
    num_queries: int
    queries: Tensor
    rows: Tensor
    slots: Tensor
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        first: Sequence[int],
        counts: Sequence[int],
        starts: Sequence[int],
        blocks: Sequence[int],
        total: int,
        device: torch.device | str,
    ) -> _Bucket:
        """For sequences whose counts[i] new tokens begin at row first[i] of the call's `total`."""
        queries = max(counts)
        slot, own = torch.arange(queries), torch.tensor(counts)[:, None]
        padded = torch.where(slot < own, torch.tensor(first)[:, None] + slot, total)
        real = padded < total
        return cls(
            size=len(counts),
            num_queries=queries,
            queries=padded.flatten().to(device),
            rows=padded[real].to(device),
            slots=real.flatten().nonzero()[:, 0].to(device),
            counts=tuple(counts),
            starts=tuple(starts),
            blocks=tuple(blocks),
        )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Where the keys of a bucket lie in the pack: [B, S] rows, of which the first may belong to a shared prompt.

    rows [B * S] (the row T for padding). own_slots, own_rows [n]: slots that hold a sequence's own keys, and their
    rows, each once. prompts [p]: the prompts' rows, [p groups, S] flattened, padding included; group_B: which prompt
    each sequence continues. Sequences without a prompt have no prompts.
    """

    rows: Tensor
    own_slots: Tensor
    own_rows: Tensor
    prompt_mask: Tensor | None = None
    prompt_rows: Tensor | None = None
    group_B: Tensor | None = None


class _GatherKeys(torch.autograd.Function):
    """x[T, K, d] -> [B * S, K, d] by rows, zeros for padding; the gradient of a shared prompt is summed in float32.

    The sum runs over the sequences in their order: the same bits in every run, which an indexed sum in parallel
    would not give.
    """

    @staticmethod
    def forward(ctx, x, keys: _Keys, size: int):  # type: ignore[no-untyped-def]
        ctx.keys, ctx.size, ctx.total = keys, size, x.shape[0]
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[keys.rows]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        keys, size = ctx.keys, ctx.size
        out = grad.new_zeros(ctx.total + 1, *grad.shape[1:])
        out[keys.own_rows] = grad[keys.own_slots]
        if keys.group_B is not None:
            wide = torch.promote_types(grad.dtype, torch.float32)
            shared = grad.view(size, -1).to(wide) * keys.prompt_mask.to(wide).repeat_interleave(
                grad.shape[1] * grad.shape[2], dim=1
            )
            groups = keys.prompt_rows.shape[0]
            summed = torch.zeros(groups, shared.shape[1], dtype=wide, device=grad.device)
            summed.index_add_(0, keys.group_B, shared)
            out[keys.prompt_rows.flatten()] = summed.view(-1, *grad.shape[1:]).to(grad.dtype)
        return out[:-1], None, None


class PackedContext:
    """Segments laid end to end without padding; positions start at 0 in each sequence. Differentiable.

    `lengths[i]` tokens belong to segment i. It is a sequence of its own, or continues segment `parents[i]` (a prompt
    that several continuations share: its tokens are computed once and seen by all of them, its gradient is the sum of
    theirs). Each token attends to its own segment and what that continues, up to itself, or with causal=False to the
    whole of its segment (which may then continue none). Padding exists only inside the attention call, within buckets
    of segments of like shape. ValueError: an empty segment, or one that cannot continue what it should.
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
        self._buckets = self._make_buckets(starts)
        self._order = torch.argsort(torch.cat([bucket.rows for bucket, _ in self._buckets]))
        self._plans: dict[tuple[int, int], Plan] = {}

    def _make_buckets(self, starts: Sequence[int]) -> list[tuple[_Bucket, _Keys]]:
        offsets, total = [], 0
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, n in enumerate(self.lengths):
            offsets.append(total)
            total += n
            width = 0 if self.parents[i] == -1 else (n - 1).bit_length() + 1
            by_shape.setdefault((-(-(starts[i] + n) // BLOCK), width), []).append(i)
        made = []
        for (blocks, width), members in sorted(by_shape.items()):
            bucket = _Bucket.of(
                [offsets[i] for i in members],
                [self.lengths[i] for i in members],
                [starts[i] for i in members],
                [blocks] * len(members),
                total,
                self.device,
            )
            made.append((bucket, self._keys(members, starts, offsets, blocks * BLOCK, total, shared=width > 0)))
        return made

    def _keys(
        self,
        members: Sequence[int],
        starts: Sequence[int],
        offsets: Sequence[int],
        size: int,
        total: int,
        *,
        shared: bool,
    ) -> _Keys:
        slot = torch.arange(size)
        start, own = (torch.tensor([x[i] for i in members])[:, None] for x in (starts, self.lengths))
        first = torch.tensor([offsets[i] for i in members])[:, None]
        is_own = (slot >= start) & (slot < start + own)
        rows = torch.where(is_own, first + slot - start, total)
        own_slots = is_own.flatten().nonzero()[:, 0]
        own_rows = rows.flatten()[own_slots]
        if not shared:
            return _Keys(*(x.to(self.device) for x in (rows.flatten(), own_slots, own_rows)))
        prompt_of = [self.parents[i] for i in members]
        prompts = sorted(set(prompt_of))
        before = torch.tensor([offsets[p] for p in prompt_of])[:, None]
        is_prompt = slot < start
        rows = torch.where(is_prompt, before + slot, rows)
        prompt_first = torch.tensor([offsets[p] for p in prompts])[:, None]
        prompt_size = torch.tensor([self.lengths[p] for p in prompts])[:, None]
        prompt_rows = torch.where(slot < prompt_size, prompt_first + slot, total)
        group = torch.tensor([prompts.index(p) for p in prompt_of])
        return _Keys(*(x.to(self.device) for x in (rows.flatten(), own_slots, own_rows, is_prompt, prompt_rows, group)))

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Nothing: what is trained on is not kept."""

    def before(self, layer: int) -> None:
        """Nothing stands before a packed sequence."""

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Attention within each sequence; `layer` is not needed here."""
        heads, kv_heads = q_THd.shape[1], k_TKd.shape[1]
        q = torch.cat([q_THd, q_THd.new_zeros(1, *q_THd.shape[1:])])
        parts = []
        for i, (bucket, where) in enumerate(self._buckets):
            plan = self._plan(i, heads // kv_heads, q.shape[2])
            rows = _query_rows(q[bucket.queries], bucket.size, bucket.num_queries, kv_heads, plan.rows)
            keys, values = (
                _GatherKeys.apply(x, where, bucket.size).view(bucket.size, -1, kv_heads, x.shape[2]).transpose(1, 2)
                for x in (k_TKd, v_TKd)
            )
            out = BlockAttention.apply(rows, keys, values, plan, scale)
            parts.append(_token_rows(out, bucket.size, bucket.num_queries, kv_heads, heads)[bucket.slots])
        return parts[0][self._order] if len(parts) == 1 else torch.cat(parts)[self._order]

    def _plan(self, index: int, group: int, width: int) -> Plan:
        if (index, group) not in self._plans:
            bucket, _ = self._buckets[index]
            if self.causal:
                plan = causal_plan(bucket.starts, bucket.num_queries, bucket.blocks, group, width, self.device)
            else:
                plan = whole_plan(bucket.counts, bucket.blocks, group, width, self.device)
            self._plans[index, group] = plan
        return self._plans[index, group]


def _query_rows(q: Tensor, size: int, queries: int, kv_heads: int, rows: int) -> Tensor:
    """[B * Q, H, d] -> [B * K, R, d], zero rows appended up to R."""
    d = q.shape[-1]
    q = q.view(size, queries, kv_heads, -1, d).transpose(1, 2).reshape(size * kv_heads, -1, d)
    extra = rows - q.shape[1]
    return torch.cat([q, q.new_zeros(q.shape[0], extra, d)], dim=1) if extra else q


def _token_rows(out: Tensor, size: int, queries: int, kv_heads: int, heads: int) -> Tensor:
    """[B * K, R, d] -> [B * Q, H, d], the inverse of `_query_rows`."""
    d = out.shape[-1]
    real = out[:, : queries * (heads // kv_heads)].reshape(size, kv_heads, queries, -1, d)
    return real.transpose(1, 2).reshape(size * queries, heads, d)


class PagedContext:
    """New tokens of sequences whose earlier keys and values lie in a block cache. Not differentiable.

    Sequence i has `starts[i]` tokens in the cache and brings `counts[i]` new ones, laid end to end in the call;
    `tables[i]` lists its block ids and must cover starts[i] + counts[i] tokens. Blocks before the first new token may
    be shared between sequences; the blocks written to may not. `prompts[i]`, where given, is the number of tokens of
    the sequence's prompt, which a network that treats prompts apart needs to know.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        prompts: Sequence[int] | None = None,
    ) -> None:
        device = cache.keys.device
        for i, (table, start, count) in enumerate(zip(tables, starts, counts, strict=True)):
            if count < 1 or start < 0 or len(table) * BLOCK < start + count:
                raise ValueError(
                    f"sequence {i}: {len(table)} blocks of {BLOCK} cannot hold {start} cached + {count} new tokens"
                )
        self.cache = cache
        known = [None] * len(starts) if prompts is None else prompts
        offsets = [end - n for end, n in zip(accumulate(counts), counts, strict=True)]
        self.segments = tuple(
            Segment(row, n, s, prompt=p) for row, n, s, p in zip(offsets, counts, starts, known, strict=True)
        )
        ends = [s + c for s, c in zip(starts, counts, strict=True)]
        needed = [-(-end // BLOCK) for end in ends]
        positions = [torch.arange(s, e) for s, e in zip(starts, ends, strict=True)]
        blocks = [torch.tensor(table[:n])[p // BLOCK] for table, n, p in zip(tables, needed, positions, strict=True)]
        self.positions_T = torch.cat(positions).to(device)
        self._slot_block = torch.cat(blocks).to(device)
        self._slot_offset = self.positions_T % BLOCK
        last = [
            (table[(s - 1) // BLOCK], (s - 1) % BLOCK) if s else (0, 0) for table, s in zip(tables, starts, strict=True)
        ]
        self._last_block, self._last_offset = torch.tensor(last).to(device).unbind(1)
        self._begins = torch.tensor([s == 0 for s in starts]).to(device)
        self._columns = (tables, starts, counts, needed, device)
        self._plans: dict[tuple[int, int], Plan] = {}

    @cached_property
    def _groups(self) -> list[tuple[_Bucket, Tensor]]:
        return self._make_groups(*self._columns)

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Put the call's keys and values of `layer` into the cache."""
        self.cache.keys[layer][self._slot_block, :, self._slot_offset] = k_TKd
        self.cache.values[layer][self._slot_block, :, self._slot_offset] = v_TKd

    def before(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value [S, K, d] of the token before each sequence's first new one; zeros where there is none."""
        begins = self._begins[:, None, None]
        keys, values = (x[layer][self._last_block, :, self._last_offset] for x in (self.cache.keys, self.cache.values))
        return keys.masked_fill(begins, 0), values.masked_fill(begins, 0)

    @staticmethod
    def _make_groups(
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        needed: Sequence[int],
        device: torch.device,
    ) -> list[tuple[_Bucket, Tensor]]:
        """Sequences that bring the same number of new tokens decode together, longest first."""
        offsets, total = [], 0
        for count in counts:
            offsets.append(total)
            total += count
        by_count: dict[int, list[int]] = {}
        for i, count in enumerate(counts):
            by_count.setdefault(count if count == 1 else -(-count // BLOCK) * BLOCK, []).append(i)
        groups = []
        for members in by_count.values():
            members.sort(key=lambda i: -needed[i])
            table = torch.zeros(len(members), needed[members[0]], dtype=torch.long)
            for row, i in enumerate(members):
                table[row, : needed[i]] = torch.tensor(tables[i][: needed[i]])
            columns = ([x[i] for i in members] for x in (offsets, counts, starts, needed))
            groups.append((_Bucket.of(*columns, total, device), table.T.contiguous().to(device)))
        return groups

    @torch.no_grad()
    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Write the new keys and values of `layer`, then attend to everything up to each query."""
        self.write(layer, k_TKd, v_TKd)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        heads, kv_heads = q_THd.shape[1], k_TKd.shape[1]
        q = torch.cat([q_THd, q_THd.new_zeros(1, *q_THd.shape[1:])])
        result = torch.empty_like(q_THd)
        for i, (bucket, table) in enumerate(self._groups):
            key = (i, heads // kv_heads)
            if key not in self._plans:
                self._plans[key] = causal_plan(
                    bucket.starts, bucket.num_queries, bucket.blocks, heads // kv_heads, q.shape[2], q.device
                )
            plan = self._plans[key]
            rows = _query_rows(q[bucket.queries], bucket.size, bucket.num_queries, kv_heads, plan.rows)
            out, _ = attend_blocks(rows, lambda j, b, t=table: (keys[t[j, :b]], values[t[j, :b]]), plan, scale)
            result[bucket.rows] = _token_rows(out, bucket.size, bucket.num_queries, kv_heads, heads)[bucket.slots]
        return result
