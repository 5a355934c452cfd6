"""Attention on a GPU, as far as can be told without one: flex_attention unfused, the Triton kernel interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from upslope.models.attention.context import BLOCK, TILE, KVCache, PackedContext, PackedFlex, PagedTiles, fused_on
from upslope.models.protocol import ModelSpec

from .test_attention_kernel import LAYOUTS, gap, softmax_attention, tensors

LONG = {
    "one tile": ([TILE], [-1], True),
    "tiles to the token": ([2 * TILE, TILE, TILE], [-1, 0, 0], True),
    "a long prompt, many short answers": ([300, *[17] * 12, 500, 90, 2], [-1, *[0] * 12, -1, 13, 13], True),
    "a long whole": ([1000, 3, 200], [-1, -1, -1], False),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter multiplies no bfloat16


def packed(layout: str, device: str) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Inputs and output of flex_attention, and those of the definition in float64."""
    lengths, parents, causal = {**LAYOUTS, **LONG}[layout]
    inputs = [x.to(device).requires_grad_(device != "cpu") for x in tensors(sum(lengths), 4, 2, 16)]
    segments = PackedContext(lengths, parents, causal=causal).segments
    found = PackedFlex(segments, causal=causal, device=device).attend(*inputs, 0.25)
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    return inputs, found, wide, softmax_attention(*wide, lengths, parents, causal, 0.25)


@pytest.mark.parametrize("layout", [*LAYOUTS, *LONG])
def test_packed_output_against_the_definition(layout: str) -> None:
    _, found, _, expected = packed(layout, "cpu")
    assert gap(found, expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: flex_attention has no gradient elsewhere")
@pytest.mark.parametrize("layout", [*LAYOUTS, *LONG])
def test_packed_gradients_against_the_definition(layout: str) -> None:
    inputs, found, wide, expected = packed(layout, "cuda")
    assert gap(found.cpu(), expected) < 1e-4
    weight = torch.randn(found.shape)
    ours = torch.autograd.grad(found, inputs, weight.to("cuda"))
    theirs = torch.autograd.grad(expected, wide, weight.double())
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a.cpu(), b) < 1e-4


@pytest.mark.parametrize("layout", [*LAYOUTS, *LONG])
def test_tiles_are_those_of_the_mask(layout: str) -> None:
    """The tiles that are computed, and those computed without a mask, are what torch finds by trying every pair."""
    lengths, parents, causal = {**LAYOUTS, **LONG}[layout]
    mask = PackedFlex(PackedContext(lengths, parents, causal=causal).segments, causal=causal, device="cpu").mask
    total = mask.seq_lengths[0]
    tried = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=TILE)
    for ours, theirs in (
        ((mask.kv_num_blocks, mask.kv_indices), (tried.kv_num_blocks, tried.kv_indices)),
        ((mask.full_kv_num_blocks, mask.full_kv_indices), (tried.full_kv_num_blocks, tried.full_kv_indices)),
        ((mask.q_num_blocks, mask.q_indices), (tried.q_num_blocks, tried.q_indices)),
        ((mask.full_q_num_blocks, mask.full_q_indices), (tried.full_q_num_blocks, tried.full_q_indices)),
    ):
        assert listed(*ours) == listed(*theirs)


def listed(counts: Tensor | None, indices: Tensor | None) -> list[list[int]]:
    assert counts is not None
    assert indices is not None
    return [row[:n].tolist() for n, row in zip(counts.flatten().tolist(), indices.flatten(0, 2), strict=True)]


def test_a_processor_keeps_its_own_attention() -> None:
    assert not fused_on(torch.zeros(1))


CALLS = {
    "decoding": ([0, 1, 63, 64, 200], [1, 1, 1, 1, 1]),
    "prompts": ([0, 0, 0], [1, 70, 150]),
    "both, and a cached beginning": ([64, 10, 128, 5], [40, 1, 130, 3]),
}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with the CUDA builds of torch")
@pytest.mark.parametrize("dtype", [torch.float32, NARROW], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 4, 8), (6, 2, 24), (7, 1, 64), (9, 3, 128)])
@pytest.mark.parametrize("call", CALLS)
def test_cached_attention_against_the_definition(
    call: str, heads: int, kv_heads: int, d: int, dtype: torch.dtype
) -> None:
    starts, counts = CALLS[call]
    spec = ModelSpec(
        num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=d, hidden_size=1, vocab_size=1, max_positions=1
    )
    lengths = [s + n for s, n in zip(starts, counts, strict=True)]
    tables, cache = scattered(spec, lengths, dtype)
    q, k, v = tensors(sum(lengths), heads, kv_heads, d, dtype)
    rows, first = [], 0
    for start, length, table in zip(starts, lengths, tables, strict=True):
        for place in range(length):
            block, row = table[place // BLOCK], first + place
            cache.keys[0, block, :, place % BLOCK] = k[row]
            cache.values[0, block, :, place % BLOCK] = v[row]
        rows += range(first + start, first + length)
        first += length
    device = torch.device(DEVICE)
    found = PagedTiles(tables, starts, counts, device).attend(
        q[rows].to(device), cache.keys[0].to(device), cache.values[0].to(device), d**-0.5
    )
    every = softmax_attention(q.double(), k.double(), v.double(), lengths, [-1] * len(lengths), True, d**-0.5)
    assert found.dtype == dtype
    assert gap(found.cpu(), every[rows]) < {torch.float32: 1e-6, NARROW: 4e-3}[dtype]


def scattered(spec: ModelSpec, lengths: Sequence[int], dtype: torch.dtype) -> tuple[list[list[int]], KVCache]:
    """Block tables in no order, and a cache with blocks to spare."""
    needed = [-(-n // BLOCK) for n in lengths]
    blocks = torch.randperm(sum(needed) + 3).tolist()
    cache = KVCache(spec, len(blocks), dtype=dtype)
    return [[blocks.pop() for _ in range(n)] for n in needed], cache
