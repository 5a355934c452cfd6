"""Texts and words as labelled items of an encoder's inputs: padded batches, logits, scores.

Shapes: B inputs, T tokens of the longest, N labelled items, C labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upslope.models.encoder.network import Encoder
from upslope.models.lora_dropout import padded_keys
from upslope.models.modes import evaluating


@dataclass(frozen=True, slots=True)
class Input:
    """One sequence of tokens and its labelled items.

    places: the token that carries each item (empty: the text itself is the one item). targets: the class of each item
    (int), or the number that it is to be given (float). row: index of the row it comes from; first: number of the
    row's items that stand in earlier inputs.
    """

    tokens: list[int]
    targets: Sequence[Any]
    places: list[int]
    types: list[int] | None = None
    row: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Padded inputs. items_N: index of each item among B (text) or B * T (tokens); rows_N, counters_N: its address.

    fields: "weight" is 1 for each item: their number is the denominator (training/step.py).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    types_BT: Tensor | None
    items_N: Tensor
    targets_N: Tensor
    rows_N: list[int]
    counters_N: list[int]
    fields: Mapping[str, Tensor] = field(default_factory=lambda: {"weight": torch.ones(())})


def groups_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Inputs of like length together, each group at most `budget` tokens with its padding (one input if longer).

    A group also ends where the next input is shorter than its longest by a quarter and by more than 6 tokens: padding
    costs as much as text. Longest first; the result depends on nothing but the arguments.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        short = longest - lengths[index] > max(6, longest / 4)
        if not groups or short or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def padded_batch(inputs: Sequence[Input], encoder: Encoder, pad: int, pad_type: int = 0) -> ItemBatch:
    """Pad on the encoder's side and address every item."""
    width = max(len(x.tokens) for x in inputs)
    left = encoder.padding_side == "left"

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return [*gap, *values] if left else [*values, *gap]

    items, rows, counters = [], [], []
    for b, x in enumerate(inputs):
        shift = b * width + (width - len(x.tokens) if left else 0)
        items += [shift + place for place in x.places] or [b]
        rows += [x.row] * len(x.targets)
        counters += range(x.first, x.first + len(x.targets))
    device = encoder.device

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    types = None if inputs[0].types is None else tensor([padded(x.types or [], pad_type) for x in inputs])
    return ItemBatch(
        ids_BT=tensor([padded(x.tokens, pad) for x in inputs]),
        mask_BT=tensor([padded([1] * len(x.tokens), 0) for x in inputs]),
        types_BT=types,
        items_N=tensor(items),
        targets_N=torch.tensor([t for x in inputs for t in x.targets], device=device),
        rows_N=rows,
        counters_N=counters,
    )


def item_logits(encoder: Encoder, batch: ItemBatch) -> Tensor:
    """Logits of the labelled items, [N, C], in float32 or wider."""
    logits = encoder(batch.ids_BT, batch.mask_BT, batch.types_BT)
    flat = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.items_N)
    return flat.float() if flat.dtype.itemsize < 4 else flat


def keys_of(encoder: Encoder, batch: ItemBatch) -> Tensor:
    """What decides the dropout of adapters, a key per row as the layers meet them; XLNet's stand [T, B]."""
    keys_BT = padded_keys(batch.ids_BT, batch.mask_BT)
    return keys_BT.t() if encoder.config.model_type == "xlnet" else keys_BT


def scores(
    encoder: Encoder, inputs: Sequence[Input], *, pad: int, pad_type: int = 0, budget: int
) -> list[list[list[float]]]:
    """The logits of every item, per input, in the order of the inputs."""
    found: list[list[list[float]]] = [[] for _ in inputs]
    with evaluating(encoder):
        for group in groups_of([len(x.tokens) for x in inputs], budget):
            batch = padded_batch([inputs[i] for i in group], encoder, pad, pad_type)
            logits = item_logits(encoder, batch).tolist()
            for i in group:
                found[i] = logits[: len(inputs[i].targets)]
                logits = logits[len(inputs[i].targets) :]
    return found


def likeliest(found: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
    """The place of every item's highest score, the first of equal ones."""
    return [[max(range(len(z)), key=z.__getitem__) for z in items] for items in found]


def pads_of(tokenizer: Any) -> tuple[int, int]:
    """The token and the token type that padding is made of."""
    return tokenizer.pad_token_id, getattr(tokenizer, "pad_token_type_id", 0) or 0
