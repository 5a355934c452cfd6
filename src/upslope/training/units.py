"""Losses that judge whole sequences: a pair of answers, a labelled answer, a solution with its steps.

A unit is what one such loss looks at. Its sequences are never split between micro-batches and share their prompt's
tokens; its loss is one number, with one weight that holds the denominator of the whole optimizer step. So the
gradient is the same for every split into micro-batches, as with the token losses of training/step.py.

Shapes: U units and B sequences of a micro-batch, N trained tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upslope.data.batching import collate, padded_from_flat, split_by_tokens
from upslope.models.protocol import CausalModel, evaluating
from upslope.training.step import Forward, Loss
from upslope.types import Batch, Example


@dataclass(slots=True)
class Unit:
    """The sequences one loss looks at, its own numbers, and how many terms its loss is the sum of."""

    examples: tuple[Example, ...]
    values: dict[str, float] = field(default_factory=dict)
    terms: int = 1

    @property
    def tokens(self) -> int:
        """Packed tokens, a prompt that all its sequences begin with counted once."""
        first = self.examples[0]
        prompt = first.mask.index(True)
        shared = len(self.examples) > 1 and all(e.tokens[:prompt] == first.tokens[:prompt] for e in self.examples)
        return sum(len(e.tokens) for e in self.examples) - shared * prompt * (len(self.examples) - 1)


def unit_batches(units: Sequence[Unit], budget: int, *, device: torch.device | str = "cpu") -> list[Batch]:
    """Packed micro-batches of at most `budget` tokens (a unit longer than that has one of its own).

    Sequences stand unit after unit. Besides the examples' own fields [N], a batch's fields hold the units' values [U]
    and "weight" [U]: one over the number of terms of all `units` together.
    """
    weight = 1 / sum(unit.terms for unit in units)
    batches = []
    for part in split_by_tokens([unit.tokens for unit in units], budget):
        chosen = [units[i] for i in part]
        batch = collate([e for unit in chosen for e in unit.examples], share_prompts=True, device=device)
        for name in chosen[0].values:
            batch.fields[name] = torch.tensor([unit.values[name] for unit in chosen], device=device)
        batch.fields["weight"] = torch.full((len(chosen),), weight, device=device)
        batches.append(batch)
    return batches


def sequence_logps(x_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per-token log-probs [N] -> (their sum, their number of tokens) of each sequence, [B] and [B]."""
    x_BT, mask_BT = padded_from_flat(x_N, batch.sequence_N, len(batch.ends_B))
    return x_BT.sum(1), mask_BT.sum(1)


def after_tokens(values_N: Tensor, final_B: Tensor, batch: Batch) -> Tensor:
    """What a head says after each trained token, [N], from what it says before each [N] and after each sequence [B].

    The trained tokens of a sequence must follow one another up to its last token.
    """
    counts = torch.bincount(batch.sequence_N, minlength=len(final_B))
    last_N = torch.zeros_like(batch.sequence_N, dtype=torch.bool)
    last_N[counts.cumsum(0) - 1] = True
    following = torch.cat([values_N[1:], values_N.new_zeros(1)])
    return torch.where(last_N, final_B[batch.sequence_N], following)


def measure(
    model: CausalModel, batches: Iterable[Batch], loss: Loss, forward: Forward = Forward()
) -> dict[str, Tensor]:
    """Loss ("loss") and metrics of every unit, [U] each, without gradient, in the order of the batches."""
    found: dict[str, list[Tensor]] = {}
    with evaluating(model, forward.head):
        for batch in batches:
            value_U, metrics = loss(batch, forward(model, batch))
            for name, part in {"loss": value_U, **metrics}.items():
                found.setdefault(name, []).append(part.float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def token_logps(
    model: CausalModel, units: Sequence[Unit], budget: int, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, list[Tensor]]]:
    """(index of a unit, log-probs of the trained tokens of each of its sequences), without gradient, batch by batch."""
    for part in split_by_tokens([unit.tokens for unit in units], budget):
        examples = [Example(e.tokens, e.mask) for i in part for e in units[i].examples]
        with evaluating(model):
            out = Forward()(model, collate(examples, share_prompts=True, device=device))
        pieces = list(out.logp_N.cpu().split([sum(e.mask) for e in examples]))
        for i in part:
            yield i, [pieces.pop(0) for _ in units[i].examples]


def weighted_mean(values_U: Mapping[str, Tensor], units: Sequence[Unit]) -> dict[str, float]:
    """Each measured sum over the number of terms."""
    terms = sum(unit.terms for unit in units)
    return {name: float(x.double().sum()) / terms for name, x in values_U.items()}
