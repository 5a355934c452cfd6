"""Attention as one would write it if bits did not matter: the baseline of benchmarks/exactness.py.

Whole-length torch operations over padded batches, no blocks of keys: scaled_dot_product_attention, or a batched product
with a float32 softmax, for training and prefill; for decoding a batched product over a dense cache whose rows stay
where they are while the same sequences decode. Everything else of the library is used as it is. Rows are not padded
anywhere at the sizes measured (`padded_row_count`: from 12 rows on), so there is no padding to take away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

import upslope.engine.runner
import upslope.training.step
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.decoder.fast import PreparedDecoder

__all__ = ["FORMS", "inexact", "through_modules"]

FORMS = ("sdpa", "bmm")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, Q, d], [B, K, S, d] -> [B, H, Q, d]; mask [B, Q, S], or None: causal."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)


def _bmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same as two batched products, the query heads of a key head side by side, and a softmax in float32."""
    (size, heads, queries, width), (kv_heads, keys) = q.shape, k.shape[1:3]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()[None] if mask is None else mask
    rows = q.reshape(size * kv_heads, -1, width)
    scores = torch.bmm(rows, k.flatten(0, 1).transpose(1, 2)).float().mul_(scale)
    scores = scores.view(size, kv_heads, -1, queries, keys).masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1).to(v.dtype).view(size * kv_heads, -1, keys)
    return torch.bmm(weights, v.flatten(0, 1)).view(size, heads, queries, width)


_ATTEND = {"sdpa": _sdpa, "bmm": _bmm}


class _Packed(PackedContext):
    """Sequences in two padded batches: those that stand alone, and those that continue a shared prompt."""

    form = "sdpa"
    calls = 0

    def __init__(self, lengths: Sequence[int], parents: Sequence[int] | None = None, **options: object) -> None:
        super().__init__(lengths, parents, **options)  # type: ignore[arg-type]
        alone = [s for s in self.segments if s.parent == -1]
        behind = [s for s in self.segments if s.parent != -1]
        total = sum(lengths)
        self._batches = [self._batch(part, total) for part in (alone, behind) if part]
        self._place = torch.argsort(torch.cat([rows for *_, rows in self._batches]))

    def _batch(self, part: list, total: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """query rows [B, Q] and key rows [B, S] (`total` for padding), mask [B, Q, S], real slots, their rows."""
        first, count, start = (torch.tensor([getattr(s, n) for s in part])[:, None] for n in ("row", "count", "start"))
        slot = torch.arange(int(count.max()))
        queries = torch.where(slot < count, first + slot, total)
        key = torch.arange(int((start + count).max()))
        before = torch.tensor([self.segments[s.parent].row if s.parent != -1 else 0 for s in part])[:, None]
        keys = torch.where(key < start, before + key, torch.where(key < start + count, first + key - start, total))
        mask = None
        if bool(start.any()):
            mask = (key[None, None] <= (start + slot)[:, :, None]).to(self.device)
        real = (queries < total).flatten().nonzero()[:, 0]
        rows = queries.flatten()[real]
        return queries.to(self.device), keys.to(self.device), mask, real.to(self.device), rows.to(self.device)

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        _Packed.calls += 1
        q, k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (q_THd, k_TKd, v_TKd))
        parts = []
        for queries, keys, mask, real, _ in self._batches:
            rows = (q[queries].transpose(1, 2), k[keys].transpose(1, 2), v[keys].transpose(1, 2))
            out = _ATTEND[self.form](*rows, mask, scale)
            parts.append(out.transpose(1, 2).flatten(0, 1)[real])
        return torch.cat(parts)[self._place]


class _Dense:
    """Keys and values [B, K, S, d] of every layer for the rows of the last call, with room to grow."""

    def __init__(self, cache: KVCache, tables: list[list[int]], starts: list[int]) -> None:
        blocks = max(len(t) for t in tables)
        self.tables, self.starts, self.room = tables, starts, (blocks + 1) * BLOCK
        index = torch.tensor([t + [0] * (blocks - len(t)) for t in tables], device=cache.keys.device)
        self.layers = [[self._gather(x, index) for x in both] for both in zip(cache.keys, cache.values, strict=True)]

    def _gather(self, blocks: Tensor, index: Tensor) -> Tensor:
        rows = blocks[index].transpose(1, 2).flatten(2, 3)
        return F.pad(rows, (0, 0, 0, self.room - rows.shape[2])).contiguous()

    def follows(self, tables: list[list[int]], starts: list[int]) -> bool:
        """Whether these are the same sequences a token later."""
        same = len(tables) == len(self.tables) and starts == [s + 1 for s in self.starts]
        return (
            same
            and max(starts) < self.room
            and all(new[: len(old)] == old for new, old in zip(tables, self.tables, strict=True))
        )


class _Paged(PagedContext):
    """Decoding over a dense copy of the cache; longer chunks over gathered blocks."""

    form = "sdpa"
    calls = 0

    def __init__(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
        **more: Any,
    ) -> None:
        super().__init__(cache, tables, starts, counts, **more)
        device = cache.keys.device
        ends = [s + c for s, c in zip(starts, counts, strict=True)]
        covered = [list(t[: -(-end // BLOCK)]) for t, end in zip(tables, ends, strict=True)]
        self.decoding = max(counts) == 1
        start, count = (torch.tensor(list(x), device=device)[:, None] for x in (starts, counts))
        slot, key = torch.arange(max(counts), device=device), torch.arange(max(ends), device=device)
        self._mask = key[None, None] <= (start + slot)[:, :, None]
        if self.decoding:
            held = getattr(cache, "dense", None)
            if held is None or not held.follows(covered, list(starts)):
                held = _Dense(cache, covered, list(starts))
            held.tables, held.starts = covered, list(starts)
            cache.dense = held  # type: ignore[attr-defined]
            self._dense, self._start = held, start[:, 0]
            self._row = torch.arange(len(starts), device=device)
            return
        total = sum(counts)
        first = torch.tensor([s.row for s in self.segments], device=device)[:, None]
        self._queries = torch.where(slot < count, first + slot, total)
        self._real = (self._queries < total).flatten().nonzero()[:, 0]
        most = max(map(len, covered))
        self._index = torch.tensor([t + [0] * (most - len(t)) for t in covered], device=device)

    @torch.no_grad()
    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        _Paged.calls += 1
        self.write(layer, k_TKd, v_TKd)
        size = self._mask.shape[2]
        if self.decoding:
            keys, values = self._dense.layers[layer]
            keys[self._row, :, self._start], values[self._row, :, self._start] = k_TKd, v_TKd
            return _bmm(q_THd[:, :, None], keys[:, :, :size], values[:, :, :size], self._mask, scale)[:, :, 0]
        keys, values = (
            x[layer][self._index].transpose(1, 2).flatten(2, 3)[:, :, :size]
            for x in (self.cache.keys, self.cache.values)
        )
        q = torch.cat([q_THd, q_THd.new_zeros(1, *q_THd.shape[1:])])[self._queries].transpose(1, 2)
        out = _ATTEND[self.form](q, keys, values, self._mask, scale)
        return out.transpose(1, 2).flatten(0, 1)[self._real]


@contextmanager
def through_modules() -> Iterator[None]:
    """Sampling goes through the decoder's modules, whose context attends, and not through `models.decoder.fast`."""
    with patch.object(PreparedDecoder, "of", lambda model, packed: None):
        yield


@contextmanager
def inexact(form: str) -> Iterator[None]:
    """Engine and trainer attend in this form ("sdpa" or "bmm") inside the block; RuntimeError where one did not."""
    _Packed.form = _Paged.form = form
    _Packed.calls = _Paged.calls = 0
    with (
        through_modules(),
        patch.object(upslope.training.step, "PackedContext", _Packed),
        patch.object(upslope.engine.runner, "PagedContext", _Paged),
    ):
        yield
    if not (_Packed.calls and _Paged.calls):
        raise RuntimeError("the library attends by another way than Context.attend: this baseline measures nothing")
