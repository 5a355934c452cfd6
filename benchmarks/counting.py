"""Multiply-adds and bytes of a training step and of a decoding step, and the rates of the machine to hold them against.

One multiply-add is two operations. What a network must compute is counted from its shape: linear layers per packed
token (a shared prompt once), attention per (query, key) pair that is not masked, the head per trained token. Row
padding and the masked half of diagonal key blocks are work of the implementation and do not count.

Shapes: T packed tokens, N trained tokens, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.protocol import CausalModel
from upslope.types import Batch

CPU_SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (4096, 576, 3072), (4096, 1536, 576), (1024, 576, 49152))
"""(rows, inner, columns) of the products whose best rate stands for the machine; the last three are SmolLM2-135M's."""
CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192))
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


def linear_size(model: nn.Module, head_weight: Tensor | None = None) -> int:
    """Multiply-adds of one row through every linear layer but the head."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not head_weight)


def attended_pairs(lengths: Sequence[int], parents: Sequence[int]) -> int:
    """(query, key) pairs of a pack: each token sees its own segment up to itself and all of what that continues."""
    return sum(n * (0 if p == -1 else lengths[p]) + n * (n + 1) // 2 for n, p in zip(lengths, parents, strict=True))


def training_counts(
    model: CausalModel,
    batches: Iterable[Batch],
    *,
    head_again: bool,
    moving: Callable[[Batch], Tensor] = lambda batch: torch.ones(batch.num_trained, dtype=torch.bool),
) -> dict[str, int]:
    """Multiply-adds by part of one forward and backward pass over `batches` with all weights trained.

    head_again: whether the backward pass computes the logits a second time (`head_is_repeated`). moving: which of a
    batch's N trained tokens have a gradient; the others go through the head's forward pass only. The attention's
    backward pass has four products a pair and computes the scores again; gradient checkpointing repeats the layers.
    """
    spec = model.spec
    linear, head = linear_size(model, model.head_weight), spec.vocab_size * spec.hidden_size
    wide = spec.num_layers * spec.num_heads * spec.head_dim
    tokens = pairs = trained = moved = 0
    for batch in batches:
        tokens += sum(batch.lengths)
        pairs += attended_pairs(batch.lengths, batch.parents)
        trained += batch.num_trained
        moved += int(moving(batch).sum())
    counts = {
        "linear forward": tokens * linear,
        "linear backward, inputs": tokens * linear,
        "linear backward, weights": tokens * linear,
        "attention forward": 2 * pairs * wide,
        "attention backward": 4 * pairs * wide,
        "attention scores again": pairs * wide,
        "head forward": trained * head,
        "head backward, inputs": moved * head,
        "head backward, weights": moved * head,
    }
    if head_again:
        counts["head again"] = moved * head
    if getattr(model, "gradient_checkpointing", False):
        counts["layers again"] = tokens * linear + 2 * pairs * wide
    return counts


def head_is_repeated(model: CausalModel, rows: int = 512) -> bool:
    """Whether head and log-softmax compute a row's logits twice, in the forward and again in the backward pass."""
    weight = model.head_weight.detach().requires_grad_()
    hidden = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
    targets = torch.arange(rows, device=weight.device) % weight.shape[0]
    seen = products_seen(lambda: linear_token_logprobs(hidden, weight, targets).sum().backward())
    return seen > 3.5 * rows * weight.numel()


def products_seen(work: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products (not the batched ones of attention) that torch runs during `work`."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter:
        work()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(op, 0) for op in _PRODUCTS) // 2


def executed(counts: dict[str, int], seen: int) -> int:
    """Multiply-adds to hold against the machine: of linear layers and head never more than torch was seen to run.

    An implementation that leaves out rows which the formula counts must not profit from it.
    """
    attention = sum(n for part, n in counts.items() if part.startswith("attention"))
    return attention + min(sum(counts.values()) - attention, seen)


def decode_counts(model: CausalModel, contexts: Sequence[int]) -> tuple[int, int]:
    """(multiply-adds, bytes) of one decoding step of rows that see contexts[i] keys each, their own included.

    Bytes: every weight that multiplies once, in the compute dtype, and each row's keys and values.
    """
    spec = model.spec
    products = linear_size(model, model.head_weight) + spec.vocab_size * spec.hidden_size
    keys = sum(contexts) * spec.num_layers * spec.head_dim
    multiply_adds = len(contexts) * products + 2 * keys * spec.num_heads
    return multiply_adds, (products + 2 * keys * spec.num_kv_heads) * model.dtype.itemsize


def roofline_seconds(multiply_adds: int, moved: int, rate: float, bandwidth: float) -> float:
    """The shortest time for so much work at `rate` operations and `bandwidth` bytes a second."""
    return max(2 * multiply_adds / rate, moved / bandwidth)


def seconds_of(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall-clock seconds of `work`, an accelerator's queue drained before and after."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def matrix_rate(
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    shapes: Sequence[tuple[int, int, int]] | None = None,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """The best rate of F.linear over the shapes, operations a second, with all threads; about `seconds` for each."""
    if shapes is None:
        shapes = CUDA_SHAPES if torch.device(device).type == "cuda" else CPU_SHAPES
    best: dict[str, Any] = {"operations_per_second": 0.0}
    each = {}
    for rows, inner, columns in shapes:
        x = torch.randn(rows, inner, device=device).to(dtype)
        weight = torch.randn(columns, inner, device=device).to(dtype)
        rate = 2 * rows * inner * columns / _shortest(lambda x=x, w=weight: F.linear(x, w), seconds, device)
        each[f"{rows}x{inner}x{columns}"] = rate
        if rate > best["operations_per_second"]:
            best = {"operations_per_second": rate, "shape": [rows, inner, columns]}
    return {"dtype": str(dtype).removeprefix("torch."), **best, "by_shape": each}


def bandwidth(*, device: torch.device | str = "cpu", size: int = 2**30, seconds: float = 1.0) -> dict[str, Any]:
    """The best rate of two streams over `size` bytes: adding them up (reads), copying them (reads and writes)."""
    x = torch.ones(size // 4, device=device)
    y = torch.empty_like(x)
    streams = {
        "sum": size / _shortest(lambda: x.sum(), seconds, device),
        "copy": 2 * size / _shortest(lambda: y.copy_(x), seconds, device),
    }
    best = max(streams, key=lambda name: streams[name])
    return {"operation": best, "bytes_per_second": streams[best], "by_operation": streams, "bytes": size}


def _shortest(work: Callable[[], object], seconds: float, device: torch.device | str) -> float:
    """Best of the repeats that fit into `seconds` after one warm-up; at least two."""
    seconds_of(work, device)
    found = [seconds_of(work, device), seconds_of(work, device)]
    while sum(found) < seconds:
        found.append(seconds_of(work, device))
    return min(found)
