"""The attention kernels against the definition in float64, and their law: a row's bits depend on the row alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from upslope.kernels import problem
from upslope.models.attention.context import BLOCK, KVCache, PackedContext, PagedContext
from upslope.models.protocol import ModelSpec

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"kernels: {problem()}")

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = [1, 2, 15, 17, 63, 64, 65, 100, 128, 130, 200]
SHARED = ([20, 5, 70, 64, 1, 130, 40, 3], [-1, 0, 0, -1, 3, 0, 3, -1])  # lengths, parents: starts 20 and 64


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], parents: Sequence[int], causal: bool, scale: float
) -> Tensor:
    """softmax(q k^T scale) v over what each token may see, written out, in the tensors' own dtype."""
    group = q.shape[1] // k.shape[1]
    firsts = [end - n for end, n in zip(accumulate(lengths), lengths, strict=True)]
    outputs = []
    for first, n, parent in zip(firsts, lengths, parents, strict=True):
        rows = [*range(first, first + n)]
        before = [] if parent == -1 else [*range(firsts[parent], firsts[parent] + lengths[parent])]
        keys, values = (x[before + rows].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,shd->hqs", q[rows], keys) * scale
        if causal:
            seen = torch.ones(n, len(before) + n, dtype=torch.bool).tril(len(before))
            scores = scores.masked_fill(~seen, -math.inf)
        outputs.append(torch.einsum("hqs,shd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


def tensors(total: int, heads: int, kv_heads: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values with scores of several units, so that no probability is negligible or flat."""
    return [torch.randn(total, n, d).mul(1.5).to(dtype) for n in (heads, kv_heads, kv_heads)]


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


LAYOUTS = {
    "separate": (LENGTHS, [-1] * len(LENGTHS), True),
    "shared": (*SHARED, True),
    "whole": ([1, 40, 64, 65, 150], [-1] * 5, False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("d", [8, 24, 64, 128])
def test_output_and_gradients_against_the_definition(
    d: int, heads: int, kv_heads: int, layout: str, dtype: torch.dtype
) -> None:
    lengths, parents, causal = LAYOUTS[layout]
    inputs = [x.requires_grad_() for x in tensors(sum(lengths), heads, kv_heads, d, dtype)]
    scale = d**-0.5
    found = PackedContext(lengths, parents, causal=causal).attend(0, *inputs, scale=scale)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = softmax_attention(*wide, lengths=lengths, parents=parents, causal=causal, scale=scale)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert found.dtype == dtype
    assert gap(found, expected) < tolerance
    weight = torch.randn(found.shape).to(dtype)
    ours = torch.autograd.grad(found, inputs, weight)
    theirs = torch.autograd.grad(expected, wide, weight.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        assert gap(a, b) < 3 * tolerance


def test_every_length_against_the_definition() -> None:
    lengths = [*range(1, 140)]
    q, k, v = tensors(sum(lengths), 2, 1, 8)
    found = PackedContext(lengths).attend(0, q, k, v, 0.4)
    expected = softmax_attention(q.double(), k.double(), v.double(), lengths, [-1] * len(lengths), True, 0.4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_two_tokens_by_hand() -> None:
    """q_1 sees scores 0 and ln 3: probabilities 1/4 and 3/4; dv_0 = 1 + 1/4, ds_1 = 3/4 * 1/4 * (8 - 4)."""
    q = torch.tensor([[[5.0]], [[1.0]]], requires_grad=True)
    k = torch.tensor([[[0.0]], [[math.log(3.0)]]], requires_grad=True)
    v = torch.tensor([[[4.0]], [[8.0]]], requires_grad=True)
    out = PackedContext([2]).attend(0, q, k, v, 1.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 7.0]), rtol=0, atol=1e-6)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(dv.flatten(), torch.tensor([1.25, 0.75]), rtol=0, atol=1e-6)
    torch.testing.assert_close(dk.flatten(), torch.tensor([-0.75, 0.75]), rtol=0, atol=1e-6)
    torch.testing.assert_close(dq.flatten(), torch.tensor([0.0, 0.75 * math.log(3.0)]), rtol=0, atol=1e-6)


def test_far_apart_scores() -> None:
    """One key takes all the weight, first, in the middle and last, with scores of thousands: no overflow."""
    k = torch.zeros(150, 1, 16)
    v = torch.arange(150.0)[:, None, None].expand(150, 1, 16)
    for winner in (0, 70, 149):
        k.zero_()
        k[winner] = 100.0
        out = PackedContext([150]).attend(0, torch.full((150, 1, 16), 3.0), k, v, 1.0)
        assert bool((out[winner:] == winner).all())


# Bits


def paged(
    inputs: Sequence[Tensor], chunks: Sequence[Sequence[int]], *, tables: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """The outputs of sequences fed to a cache in calls: chunks[call][i] tokens of sequence i (0: it is left out).

    inputs: q, k, v of the sequences end to end.
    """
    lengths = [sum(column) for column in zip(*chunks, strict=True)]
    q, k, v = (x.split(lengths) for x in inputs)
    heads, kv_heads, d = q[0].shape[1], k[0].shape[1], q[0].shape[2]
    width = -(-max(lengths) // BLOCK)
    if tables is None:
        order = torch.randperm(width * len(lengths), generator=torch.Generator().manual_seed(1)).tolist()
        tables = [order[i * width : (i + 1) * width] for i in range(len(lengths))]
    spec = ModelSpec(1, heads, kv_heads, d, heads * d, 10, 1000)
    cache = KVCache(spec, width * len(lengths), dtype=q[0].dtype)
    cache.keys.fill_(math.nan)  # what a block holds behind its sequence's end must not matter
    cache.values.fill_(math.nan)
    done = [0] * len(lengths)
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    for call in chunks:
        who = [i for i, n in enumerate(call) if n]
        context = PagedContext(cache, [tables[i] for i in who], [done[i] for i in who], [call[i] for i in who])
        new = [torch.cat([x[i][done[i] : done[i] + call[i]] for i in who]) for x in (q, k, v)]
        for i, out in zip(who, context.attend(0, *new, scale=0.3).split([call[i] for i in who]), strict=True):
            outputs[i].append(out)
            done[i] += call[i]
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (2, 2, 24), (8, 1, 16), (4, 2, 128), (3, 3, 7)])
def test_decoding_equals_chunks_equals_a_pack(heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    lengths = [1, 70, 64, 129, 150]
    inputs = tensors(sum(lengths), heads, kv_heads, d, dtype)
    whole = PackedContext(lengths).attend(0, *inputs, scale=0.3).split(lengths)
    for i, mine in enumerate(whole):
        alone = [x.split(lengths)[i] for x in inputs]
        assert torch.equal(PackedContext([lengths[i]]).attend(0, *alone, scale=0.3), mine)
    one_by_one = [[int(t < n) for n in lengths] for t in range(max(lengths))]
    in_chunks = [[1, 50, 0, 1, 63], [0, 1, 60, 64, 2], [0, 19, 4, 64, 85]]
    for chunks in (one_by_one, in_chunks, [lengths]):
        for found, expected in zip(paged(inputs, chunks), whole, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_shared_prompt_changes_no_bit(heads: int, dtype: torch.dtype) -> None:
    lengths, parents = SHARED
    inputs = tensors(sum(lengths), heads, 1, 40, dtype)
    shared = PackedContext(lengths, parents).attend(0, *inputs, scale=0.3).split(lengths)
    rows = torch.arange(sum(lengths)).split(lengths)
    for i, parent in enumerate(parents):
        order = rows[i] if parent == -1 else torch.cat([rows[parent], rows[i]])
        apart = PackedContext([len(order)]).attend(0, *(x[order] for x in inputs), scale=0.3)
        assert torch.equal(apart[-lengths[i] :], shared[i])


def outputs_and_gradients(
    inputs: Sequence[Tensor], lengths: Sequence[int], parents: Sequence[int], threads: int
) -> list[Tensor]:
    torch.set_num_threads(threads)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = PackedContext(lengths, parents).attend(0, *inputs, scale=0.3)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_repeat_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    lengths, parents = [200, 90, 64, *[75] * 12], [-1, 0, -1, *[2] * 12]
    inputs = tensors(sum(lengths), 6, 2, 64, dtype)
    first = outputs_and_gradients(inputs, lengths, parents, 1)
    for threads in (1, 2, 3, 2):
        again = outputs_and_gradients(inputs, lengths, parents, threads)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit_of_decoding(threads: int) -> None:
    lengths = [150] * 12
    inputs = tensors(sum(lengths), 6, 2, 64, torch.bfloat16)
    expected = PackedContext(lengths).attend(0, *inputs, scale=0.3).split(lengths)
    torch.set_num_threads(threads)
    for found, wanted in zip(paged(inputs, [[140] * 12, *[[1] * 12] * 10]), expected, strict=True):
        assert torch.equal(found, wanted)


def test_one_long_sequence_on_several_threads() -> None:
    inputs = tensors(700, 3, 1, 16)
    first = outputs_and_gradients(inputs, [700], [-1], 1)
    again = outputs_and_gradients(inputs, [700], [-1], 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_stays_in_its_sequence_and_behind_its_token(part: int) -> None:
    lengths = [70, 130, 66]
    inputs = [x.requires_grad_() for x in tensors(sum(lengths), 6, 2, 24)]
    clean = PackedContext(lengths).attend(0, *inputs, scale=0.3)
    clean_grads = torch.autograd.grad(clean.square().sum(), inputs)
    with torch.no_grad():
        inputs[part][70 + 67] = math.nan  # position 67 of the second sequence
    spoilt = PackedContext(lengths).attend(0, *inputs, scale=0.3)
    assert torch.equal(spoilt[:137], clean[:137])
    assert bool(spoilt[137].isnan().all())
    assert torch.equal(spoilt[200:], clean[200:])
    grads = torch.autograd.grad(spoilt.square().sum(), inputs)
    for a, b in zip(grads, clean_grads, strict=True):
        assert torch.equal(a[:70], b[:70])
        assert torch.equal(a[200:], b[200:])


def test_rows_that_do_not_fit_are_refused() -> None:
    q, k, v = tensors(5, 4, 2, 8)
    with pytest.raises(ValueError, match="5 tokens"):
        PackedContext([5]).attend(0, q[:4], k, v, 1.0)
    with pytest.raises(ValueError, match="do not fit keys"):
        PackedContext([5]).attend(0, q, k[..., :4].contiguous(), v, 1.0)
    with pytest.raises(ValueError, match="do not fit keys"):
        PackedContext([5]).attend(0, q[:, :3], k, v, 1.0)
    cache = KVCache(ModelSpec(1, 4, 2, 16, 64, 10, 100), 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit blocks"):
        PagedContext(cache, [[0]], [0], [5]).attend(0, q, k, v, 1.0)
    with pytest.raises(ValueError, match="blocks 0 to 0"):
        PagedContext(cache, [[1]], [0], [5])
