"""Attention over blocks of 64 keys, causal or not, one code path for training, scoring, prefill and decoding.

The sum over keys always runs block by block with a float32 running maximum, normaliser and accumulator, so that a
query's output is the same number, bit for bit, whether it is computed alone from the cache (decode), in a packed
batch (training) or behind a shared prompt. A block that is masked as a whole leaves every bit as it was.
The online softmax is Milakov & Gimelshein 2018 (arXiv 1805.02867), its backward pass FlashAttention's
(Dao et al. 2022, arXiv 2205.14135, appendix B).

Shapes: T packed tokens, H query heads, K key/value heads, g = H / K query heads per key head, d head width,
B sequences of one bucket, R query rows of one (sequence, key head): position-major, then the g heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from upslope.models.protocol import ModelSpec, Segment

__all__ = ["BLOCK", "KVCache", "PackedContext", "PagedContext"]

BLOCK = 64

Fetch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(block index j, number of sequences b) -> keys, values [b, K, BLOCK, d] of the first b sequences."""


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
class _Plan:
    """Which query rows meet which key block, for sequences sorted by falling number of blocks.

    active[j]: how many sequences have a block j; first_row[j]: the first query row that may see it; mask_rows[j]: the
    row up to which some key of it lies in the future; positions: [B or 1, R] of each row; rows: R, padded so that
    every product has a row count at which results do not depend on the count.
    """

    active: tuple[int, ...]
    first_row: tuple[int, ...]
    mask_rows: tuple[int, ...]
    positions: Tensor
    rows: int


def _plan(starts: Sequence[int], queries: int, blocks: Sequence[int], group: int, device: torch.device | str) -> _Plan:
    """Plan for `queries` query positions from starts[i] on, and blocks[i] key blocks (falling), of each sequence."""
    earliest, active, first_row = min(starts), [], []
    for j in range(blocks[0]):
        here = sum(n > j for n in blocks)
        active.append(here)
        first_row.append(max(0, j * BLOCK - max(starts[:here])) * group)
    least = 8 if queries == 1 else 12
    rows = first_row[-1] + max(least, queries * group - first_row[-1])
    mask_rows = [min(rows, max(0, (j + 1) * BLOCK - 1 - earliest) * group) for j in range(blocks[0])]
    offsets = torch.arange(rows, device=device) // group
    if earliest == max(starts):
        positions = (offsets + earliest)[None]
    else:
        positions = offsets[None] + torch.tensor(starts, device=device)[:, None]
    return _Plan(tuple(active), tuple(first_row), tuple(mask_rows), positions, rows)


def _plan_all(lengths: Sequence[int], blocks: Sequence[int], group: int, device: torch.device | str) -> _Plan:
    """Plan in which every query of sequence i sees all of its lengths[i] keys: each row stands at the last position."""
    queries, last = max(lengths), min(lengths) - 1
    rows = max(8 if queries == 1 else 12, queries * group)
    mask_rows = tuple(rows if (j + 1) * BLOCK - 1 > last else 0 for j in range(blocks[0]))
    positions = (torch.tensor(lengths, device=device) - 1)[:, None].expand(len(lengths), rows)
    active = tuple(sum(n > j for n in blocks) for j in range(blocks[0]))
    return _Plan(active, (0,) * blocks[0], mask_rows, positions, rows)


def _scores(q: Tensor, keys: Tensor, plan: _Plan, j: int, scale: float, stat: torch.dtype) -> Tensor:
    """Scaled, masked scores [b * K, R - r0, BLOCK] of block j in the statistics' dtype."""
    b, r0 = plan.active[j], plan.first_row[j]
    kv_heads = keys.shape[1]
    s = torch.bmm(q[: b * kv_heads, r0:], keys.flatten(0, 1).transpose(1, 2)).to(stat).mul_(scale)
    masked = plan.mask_rows[j] - r0
    if masked > 0:
        positions = plan.positions[:b] if plan.positions.shape[0] > 1 else plan.positions
        future = torch.arange(j * BLOCK, (j + 1) * BLOCK, device=q.device) > positions[:, r0 : r0 + masked, None]
        s.view(b, kv_heads, *s.shape[1:])[:, :, :masked].masked_fill_(future[:, None], float("-inf"))
    return s


def _forward(q: Tensor, fetch: Fetch, plan: _Plan, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query rows q [B * K, R, d]; returns the output like q and the log-normaliser [B * K, R, 1]."""
    stat = torch.promote_types(q.dtype, torch.float32)
    top = total = out = torch.empty(0)
    for j, (b, r0) in enumerate(zip(plan.active, plan.first_row, strict=True)):
        keys, values = fetch(j, b)
        heads = b * keys.shape[1]
        s = _scores(q, keys, plan, j, scale, stat)
        peak = s.amax(-1, keepdim=True)
        if j == 0:
            top = peak
            p = s.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            out = torch.bmm(p.to(q.dtype), values.flatten(0, 1)).to(stat)
            continue
        old = top[:heads, r0:]
        new = torch.maximum(old, peak)
        shrink = (old - new).exp_()
        p = s.sub_(new).exp_()
        top[:heads, r0:] = new
        total[:heads, r0:] = total[:heads, r0:] * shrink + p.sum(-1, keepdim=True)
        out[:heads, r0:] = out[:heads, r0:] * shrink + torch.bmm(p.to(q.dtype), values.flatten(0, 1))
    return (out / total).to(q.dtype), top + total.log()


class _PackedAttention(torch.autograd.Function):
    """Attention of one length bucket with FlashAttention's backward pass: no probability is kept."""

    @staticmethod
    def forward(ctx, q, k, v, plan: _Plan, scale: float):  # type: ignore[no-untyped-def]
        out, lse = _forward(q, lambda j, b: _block(k, v, j, b), plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[no-untyped-def]
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        grad_out = grad_out.contiguous()
        stat = lse.dtype
        delta = (grad_out.to(stat) * out.to(stat)).sum(-1, keepdim=True)
        grad_q = torch.zeros(q.shape, dtype=stat, device=q.device)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for j, (b, r0) in enumerate(zip(plan.active, plan.first_row, strict=True)):
            keys, values = _block(k, v, j, b)
            heads = b * k.shape[1]
            rows = slice(r0, None)
            p = _scores(q, keys, plan, j, scale, stat).sub_(lse[:heads, rows]).exp_()
            upstream = grad_out[:heads, rows]
            ds = torch.bmm(upstream, values.flatten(0, 1).transpose(1, 2)).to(stat)
            ds = ds.sub_(delta[:heads, rows]).mul_(p).mul_(scale).to(q.dtype)
            span = slice(j * BLOCK, (j + 1) * BLOCK)
            grad_q[:heads, rows] += torch.bmm(ds, keys.flatten(0, 1))
            grad_k[:b, :, span] = torch.bmm(ds.transpose(1, 2), q[:heads, rows]).view_as(keys)
            grad_v[:b, :, span] = torch.bmm(p.to(q.dtype).transpose(1, 2), upstream).view_as(values)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _block(k: Tensor, v: Tensor, j: int, b: int) -> tuple[Tensor, Tensor]:
    span = slice(j * BLOCK, (j + 1) * BLOCK)
    return k[:b, :, span].contiguous(), v[:b, :, span].contiguous()


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
        self._plans: dict[tuple[int, int], _Plan] = {}

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
            plan = self._plan(i, heads // kv_heads)
            rows = _query_rows(q[bucket.queries], bucket.size, bucket.num_queries, kv_heads, plan.rows)
            keys, values = (
                _GatherKeys.apply(x, where, bucket.size).view(bucket.size, -1, kv_heads, x.shape[2]).transpose(1, 2)
                for x in (k_TKd, v_TKd)
            )
            out = _PackedAttention.apply(rows, keys, values, plan, scale)
            parts.append(_token_rows(out, bucket.size, bucket.num_queries, kv_heads, heads)[bucket.slots])
        return parts[0][self._order] if len(parts) == 1 else torch.cat(parts)[self._order]

    def _plan(self, index: int, group: int) -> _Plan:
        if (index, group) not in self._plans:
            bucket, _ = self._buckets[index]
            if self.causal:
                plan = _plan(bucket.starts, bucket.num_queries, bucket.blocks, group, self.device)
            else:
                plan = _plan_all(bucket.counts, bucket.blocks, group, self.device)
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
        self._plans: dict[tuple[int, int], _Plan] = {}

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
                self._plans[key] = _plan(bucket.starts, bucket.num_queries, bucket.blocks, heads // kv_heads, q.device)
            plan = self._plans[key]
            rows = _query_rows(q[bucket.queries], bucket.size, bucket.num_queries, kv_heads, plan.rows)
            out, _ = _forward(rows, lambda j, b, t=table: (keys[t[j, :b]], values[t[j, :b]]), plan, scale)
            result[bucket.rows] = _token_rows(out, bucket.size, bucket.num_queries, kv_heads, heads)[bucket.slots]
        return result
