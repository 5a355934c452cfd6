"""Attention in plain torch, on any device: sequences of like shape, padded to their longest, side by side.

Padding and masked blocks change no bit of a row (block_softmax.py), so neither does the company a sequence is in.

Shapes: T packed tokens, H query heads, K key/value heads, g = H / K query heads per key head, d head width,
B sequences of one bucket, R query rows of one (sequence, key head): position-major, then the g heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from upslope.models.attention.block_softmax import BLOCK, BlockAttention, Plan, attend_blocks, causal_plan, whole_plan


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

    def __init__(
        self, lengths: Sequence[int], parents: Sequence[int], *, causal: bool, device: torch.device | str
    ) -> None:
        self.lengths, self.parents, self.device = lengths, parents, device
        buckets = self._make_buckets([0 if p == -1 else lengths[p] for p in parents])
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

    def _make_buckets(self, starts: Sequence[int]) -> list[tuple[_Bucket, _Keys]]:
        *offsets, total = accumulate(self.lengths, initial=0)
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, n in enumerate(self.lengths):
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


class PagedBuckets(_Buckets):
    """The new tokens of a PagedContext: sequences that bring the same number of them side by side, longest first."""

    def __init__(
        self, tables: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> None:
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
