"""Attention over the block cache on a GPU, in Triton: decoding and prefill, nothing gathered, shapes that stay.

One program takes a tile of consecutive query tokens of one sequence with all query heads of one key head, and goes
through the sequence's blocks in order (online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867; block tables: Kwon
et al. 2023, arXiv 2309.06180). How many blocks a tile reads stands in memory, so a captured graph serves every length.

Shapes: T query tokens, H query heads, K key/value heads, d head width, S sequences, n tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
_LEAST_ROWS = 16  # of a product on tensor cores


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_at,
    keys_at,
    values_at,
    out_at,
    tables_at,
    tiles_at,
    table_width,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile, kv = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles_at + tile * 4)
    row = tl.load(tiles_at + tile * 4 + 1)
    start = tl.load(tiles_at + tile * 4 + 2)
    count = tl.load(tiles_at + tile * 4 + 3)

    group: tl.constexpr = HEADS // KV_HEADS
    r = tl.arange(0, ROWS)
    token = r // group
    c = tl.arange(0, PADDED)
    inside = c < WIDTH
    at = ((row + token).to(tl.int64) * HEADS + kv * group + r % group)[:, None] * WIDTH + c[None, :]
    real = (token < count)[:, None] & inside[None, :]
    q = tl.load(q_at + at, mask=real, other=0.0)
    key = tl.arange(0, BLOCK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, PADDED], tl.float32)
    for j in range(0, (start + count + BLOCK - 1) // BLOCK):
        block = tl.load(tables_at + sequence.to(tl.int64) * table_width + j).to(tl.int64)
        base = (block * KV_HEADS + kv) * BLOCK * WIDTH
        k = tl.load(keys_at + base + key[None, :] * WIDTH + c[:, None], mask=inside[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale
        s = tl.where((j * BLOCK + key)[None, :] <= (start + token)[:, None], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values_at + base + key[:, None] * WIDTH + c[None, :], mask=inside[None, :], other=0.0)
        out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    tl.store(out_at + at, (out / total[:, None]).to(out_at.dtype.element_ty), mask=real)


def tile_tokens(heads: int, kv_heads: int) -> int:
    """How many consecutive tokens a tile may have."""
    return max(1, _ROWS // (heads // kv_heads))


def paged_attention_gpu(
    q_THd: Tensor, keys: Tensor, values: Tensor, tables_SB: Tensor, tiles_n4: Tensor, *, scale: float, longest: int
) -> Tensor:
    """Causal attention of new tokens to everything in one layer's blocks [., K, BLOCK, d]; [T, H, d].

    tiles_n4 int32: sequence, first row of the call, its position, number of tokens (at most `longest`, and that at most
    `tile_tokens`; 0 for a tile whose rows are not to be written). tables_SB int32: the blocks of each sequence.
    """
    heads, width = q_THd.shape[1:]
    kv_heads, block = keys.shape[1:3]
    rows = max(_LEAST_ROWS, triton.next_power_of_2(longest * (heads // kv_heads)))
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    _attend[(tiles_n4.shape[0], kv_heads)](
        q_THd.contiguous(),
        keys,
        values,
        out,
        tables_SB,
        tiles_n4,
        tables_SB.shape[1],
        scale,
        HEADS=heads,
        KV_HEADS=kv_heads,
        WIDTH=width,
        PADDED=max(16, triton.next_power_of_2(width)),
        ROWS=rows,
        BLOCK=block,
    )
    return out
