"""Dropout of what adapters read (as peft's lora_dropout), by a counter and not by a generator.

A number is dropped where a hash of (seed, step, layer, the sequence up to this token, channel) says so: whatever the
micro-batches, the packing and the order, and again where activations are recomputed. It acts inside `dropping` alone.

Shapes: T packed tokens, S segments, B padded texts of T tokens, D width.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upslope.errors import ModelError
from upslope.types import Batch


def _mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea & Flood 2014) of int64, whose products wrap."""
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(factor)  # the shift keeps the sign
    return x


class AdapterDropout(nn.Module):
    """x with each number 0 with probability p, else over 1 - p, where `keys` are set (one per row); else x itself.

    p counts in 65536ths, rounded up. ModelError for an x whose rows are not those of the keys.
    """

    def __init__(self, p: float, seed: int, layer: int) -> None:
        super().__init__()
        self.dropped = math.ceil(p * 2**16)
        self.own = int(_mix(_mix(torch.tensor(seed % 2**63)) + layer))
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keys is None:
            return x
        extra = x.shape[:-1].numel() - self.keys.numel()
        if extra < 0 or (extra and x.dim() > 2):  # rows added behind packed ones are read by nobody
            raise ModelError(
                f"lora_dropout: a layer with adapters reads {x.shape[:-1].numel()} rows of {self.keys.numel()} tokens; "
                "set it to 0, or name other layers (lora_target_modules)"
            )
        rows = _mix(F.pad(self.keys.flatten(), (0, extra)) + self.own)
        words = _mix(rows[:, None] + torch.arange(-(-x.shape[-1] // 4), device=x.device) * -0x61C8864680B583EB)
        drop = words.view(torch.int16)[:, : x.shape[-1]] < self.dropped - 2**15  # four numbers a word
        return x.masked_fill(drop.view(x.shape), 0) * (2**16 / (2**16 - self.dropped))


def drop_inputs(model: nn.Module, p: float, seed: int) -> None:
    """Give every adapter of `model` its dropout; with p = 0 it stays as peft made it, without."""
    adapters = [m.lora_dropout for m in model.modules() if isinstance(getattr(m, "lora_dropout", None), nn.ModuleDict)]
    for layer, places in enumerate(adapters if p else ()):
        places["default"] = AdapterDropout(p, seed, layer)


@contextmanager
def dropping(
    model: nn.Module, batches: Iterable[Any], keys_of: Callable[[Any], Tensor], step: int | None
) -> Iterator[Iterator[Any]]:
    """The batches one by one; while one is at work, forward and backward, the adapters drop out what `step` has them.

    keys_of: a key per row of the batch, as the layers meet them. A step of None drops nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterDropout)] if step is not None else []

    def each() -> Iterator[Any]:
        for batch in batches:
            keys = _mix(keys_of(batch) + _mix(torch.tensor(step))) if layers else None
            for layer in layers:
                layer.keys = keys
            yield batch

    try:
        yield each()
    finally:
        for layer in layers:
            layer.keys = None


def packed_keys(batch: Batch) -> Tensor:
    """A key per packed token [T], of all tokens of its sequence up to it; a shared prompt's are what they are alone."""
    lengths_S, parents_S = (torch.tensor(x, device=batch.tokens_T.device) for x in (batch.lengths, batch.parents))
    sums_T = _mix(_mix(batch.positions_T) + batch.tokens_T).cumsum(0)
    ends_S = sums_T[lengths_S.cumsum(0) - 1]
    before_S = F.pad(ends_S[:-1], (1, 0))
    before_S = before_S - torch.where(parents_S < 0, 0, (ends_S - before_S)[parents_S])
    return sums_T - before_S.repeat_interleave(lengths_S)


def padded_keys(ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A key per token [B, T], of its whole text (which an encoder sees) and its place in it, padding aside."""
    places_BT = mask_BT.cumsum(1)
    whole_B1 = (_mix(_mix(places_BT) + ids_BT) * mask_BT).sum(1, keepdim=True)
    return _mix(whole_B1 + places_BT)
