"""Online softmax over blocks of 64 keys, forward and backward: the arithmetic behind models.attention.context.

A plan says which query rows meet which key block and what is masked; the sum over keys runs block by block with a
float32 running maximum, normaliser and accumulator. Online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867);
backward pass: FlashAttention's (Dao et al. 2022, arXiv 2205.14135, appendix B).

Shapes: K key/value heads, g query heads per key head, d head width, B sequences of one bucket, R query rows of one
(sequence, key head): position-major, then the g heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.kernels.products import least_rows, padded_row_count

BLOCK = 64

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


def causal_plan(
    starts: Sequence[int], queries: int, blocks: Sequence[int], group: int, width: int, device: torch.device | str
) -> Plan:
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


def whole_plan(
    lengths: Sequence[int], blocks: Sequence[int], group: int, width: int, device: torch.device | str
) -> Plan:
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
