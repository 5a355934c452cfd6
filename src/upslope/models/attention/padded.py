"""Attention in plain torch, on any device: sequences of like shape, padded to their longest, side by side.

A plan says which query rows meet which key block and what is masked; the sum over keys runs block by block with a
float32 running maximum, normaliser and accumulator. Online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867);
backward pass: FlashAttention's (Dao et al. 2022, arXiv 2205.14135, appendix B). Padding and masked blocks change no bit
of a row, so neither does the company a sequence is in.

Shapes: T packed tokens, H query heads, K key/value heads, g = H / K query heads per key head, d head width,
B sequences of one bucket, R query rows of one (sequence, key head): position-major, then the g heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from upslope.kernels.products import least_rows, padded_row_count

BLOCK = 64

Ints = Sequence[int]
Fetch = Callable[[int, int], tuple[Tensor, Tensor]]
"""(block index j, number of sequences b) -> keys, values [b, K, BLOCK, d] of the first b sequences."""


@dataclass(frozen=True, slots=True)
class Plan:
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


def causal_plan(starts: Ints, queries: int, blocks: Ints, group: int, width: int, device: torch.device | str) -> Plan:
    """Plan for `queries` query positions from starts[i] on, and blocks[i] key blocks (falling), of each sequence.

    width: of a head.
    """
    earliest, active, first_row = min(starts), [], []
    for j in range(blocks[0]):
        here = sum(n > j for n in blocks)
        active.append(here)
        first_row.append(max(0, j * BLOCK - max(starts[:here])) * group)
    least = padded_row_count(max(8 if queries == 1 else 12, least_rows(BLOCK * width)))
    rows = first_row[-1] + max(least, queries * group - first_row[-1])
    mask_rows = [min(rows, max(0, (j + 1) * BLOCK - 1 - earliest) * group) for j in range(blocks[0])]
    offsets = torch.arange(rows, device=device) // group
    if earliest == max(starts):
        positions = (offsets + earliest)[None]
    else:
        positions = offsets[None] + torch.tensor(starts, device=device)[:, None]
    return Plan(tuple(active), tuple(first_row), tuple(mask_rows), positions, rows)


def whole_plan(lengths: Ints, blocks: Ints, group: int, width: int, device: torch.device | str) -> Plan:
    """Plan in which every query of sequence i sees all of its lengths[i] keys: each row stands at the last position."""
    queries, last = max(lengths), min(lengths) - 1
    rows = max(12, least_rows(BLOCK * width), queries * group)
    mask_rows = tuple(rows if (j + 1) * BLOCK - 1 > last else 0 for j in range(blocks[0]))
    positions = (torch.tensor(lengths, device=device) - 1)[:, None].expand(len(lengths), rows)
    active = tuple(sum(n > j for n in blocks) for j in range(blocks[0]))
    return Plan(active, (0,) * blocks[0], mask_rows, positions, rows)


def _scores(q: Tensor, keys: Tensor, plan: Plan, j: int, scale: float, stat: torch.dtype) -> Tensor:
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


def attend_blocks(q: Tensor, fetch: Fetch, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
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


class BlockAttention(torch.autograd.Function):
    """Attention of one length bucket with FlashAttention's backward pass: no probability is kept."""

    @staticmethod
    def forward(ctx, q, k, v, plan: Plan, scale: float):  # type: ignore[no-untyped-def]
        out, lse = attend_blocks(q, lambda j, b: _block(k, v, j, b), plan, scale)
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
        cls, first: Ints, counts: Ints, starts: Ints, blocks: Ints, total: int, device: torch.device | str
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


class _Buckets:
    """A call's buckets, each with where its keys are; the plans are made when first used."""

    def __init__(self, buckets: list[tuple[_Bucket, Any]], *, causal: bool, device: torch.device | str) -> None:
        self._buckets, self._causal, self._device = buckets, causal, device
        self._plans: dict[tuple[int, int], Plan] = {}

    def _queries(self, q_THd: Tensor, kv_heads: int) -> Iterator[tuple[_Bucket, Any, Plan, Tensor]]:
        """Each bucket, where its keys are, its plan and its query rows [B * K, R, d]."""
        group, width = q_THd.shape[1] // kv_heads, q_THd.shape[2]
        q = torch.cat([q_THd, q_THd.new_zeros(1, *q_THd.shape[1:])])
        for i, (bucket, where) in enumerate(self._buckets):
            if (i, group) not in self._plans:
                shape = bucket.blocks, group, width, self._device
                self._plans[i, group] = (
                    causal_plan(bucket.starts, bucket.num_queries, *shape)
                    if self._causal
                    else whole_plan(bucket.counts, *shape)
                )
            plan = self._plans[i, group]
            yield bucket, where, plan, _query_rows(q[bucket.queries], bucket, kv_heads, plan.rows)


class PackedBuckets(_Buckets):
    """The segments of a PackedContext in buckets; differentiable."""

    def __init__(self, lengths: Ints, parents: Ints, *, causal: bool, device: torch.device | str) -> None:
        self.lengths, self.parents, self.device = lengths, parents, device
        self.starts = [0 if p == -1 else lengths[p] for p in parents]
        *self.offsets, self.total = accumulate(lengths, initial=0)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, (start, parent, n) in enumerate(zip(self.starts, parents, lengths, strict=True)):
            width = 0 if parent == -1 else (n - 1).bit_length() + 1
            by_shape.setdefault((-(-(start + n) // BLOCK), width), []).append(i)
        buckets = []
        for (blocks, width), members in sorted(by_shape.items()):
            columns = ([x[i] for i in members] for x in (self.offsets, lengths, self.starts))
            bucket = _Bucket.of(*columns, [blocks] * len(members), self.total, device)
            buckets.append((bucket, self._keys(members, blocks * BLOCK, shared=width > 0)))
        super().__init__(buckets, causal=causal, device=device)
        self._order = torch.argsort(torch.cat([bucket.rows for bucket, _ in buckets]))

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Attention within each sequence, [T, H, d]."""
        kv_heads, parts = k_TKd.shape[1], []
        for bucket, where, plan, rows in self._queries(q_THd, kv_heads):
            keys, values = (
                _GatherKeys.apply(x, where, bucket.size).view(bucket.size, -1, kv_heads, x.shape[2]).transpose(1, 2)
                for x in (k_TKd, v_TKd)
            )
            out = BlockAttention.apply(rows, keys, values, plan, scale)
            parts.append(_token_rows(out, bucket, kv_heads, q_THd.shape[1])[bucket.slots])
        return parts[0][self._order] if len(parts) == 1 else torch.cat(parts)[self._order]

    def _keys(self, members: Ints, size: int, *, shared: bool) -> _Keys:
        slot = torch.arange(size)
        columns = self.starts, self.lengths, self.offsets
        start, own, first = (torch.tensor([x[i] for i in members])[:, None] for x in columns)
        is_own = (slot >= start) & (slot < start + own)
        rows = torch.where(is_own, first + slot - start, self.total)
        own_slots = is_own.flatten().nonzero()[:, 0]
        own_rows = rows.flatten()[own_slots]
        if not shared:
            return _Keys(*(x.to(self.device) for x in (rows.flatten(), own_slots, own_rows)))
        prompt_of = [self.parents[i] for i in members]
        prompts = sorted(set(prompt_of))
        before = torch.tensor([self.offsets[p] for p in prompt_of])[:, None]
        is_prompt = slot < start
        rows = torch.where(is_prompt, before + slot, rows)
        prompt_first = torch.tensor([self.offsets[p] for p in prompts])[:, None]
        prompt_size = torch.tensor([self.lengths[p] for p in prompts])[:, None]
        prompt_rows = torch.where(slot < prompt_size, prompt_first + slot, self.total)
        group = torch.tensor([prompts.index(p) for p in prompt_of])
        return _Keys(*(x.to(self.device) for x in (rows.flatten(), own_slots, own_rows, is_prompt, prompt_rows, group)))


class PagedBuckets(_Buckets):
    """The new tokens of a PagedContext: sequences that bring the same number of them side by side, longest first."""

    def __init__(self, tables: Sequence[Ints], starts: Ints, counts: Ints, device: torch.device) -> None:
        needed = [-(-(s + c) // BLOCK) for s, c in zip(starts, counts, strict=True)]
        *offsets, total = accumulate(counts, initial=0)
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
            groups.append((_Bucket.of(*columns, total=total, device=device), table.T.contiguous().to(device)))
        super().__init__(groups, causal=True, device=device)

    def attend(self, q_THd: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention to everything up to each query in one layer's blocks [., K, BLOCK, d]; [T, H, d]."""
        kv_heads, result = keys.shape[1], torch.empty_like(q_THd)
        for bucket, table, plan, rows in self._queries(q_THd, kv_heads):
            out, _ = attend_blocks(rows, lambda j, b, t=table: (keys[t[j, :b]], values[t[j, :b]]), plan, scale)
            result[bucket.rows] = _token_rows(out, bucket, kv_heads, q_THd.shape[1])[bucket.slots]
        return result


def _query_rows(q: Tensor, bucket: _Bucket, kv_heads: int, rows: int) -> Tensor:
    """[B * Q, H, d] -> [B * K, R, d], zero rows appended up to R."""
    d = q.shape[-1]
    q = q.view(bucket.size, bucket.num_queries, kv_heads, -1, d).transpose(1, 2).reshape(bucket.size * kv_heads, -1, d)
    extra = rows - q.shape[1]
    return torch.cat([q, q.new_zeros(q.shape[0], extra, d)], dim=1) if extra else q


def _token_rows(out: Tensor, bucket: _Bucket, kv_heads: int, heads: int) -> Tensor:
    """[B * K, R, d] -> [B * Q, H, d], the inverse of `_query_rows`."""
    d, size, queries = out.shape[-1], bucket.size, bucket.num_queries
    real = out[:, : queries * (heads // kv_heads)].reshape(size, kv_heads, queries, -1, d)
    return real.transpose(1, 2).reshape(size * queries, heads, d)
