"""One optimizer update: forward over packed micro-batches, one global denominator, clip, AdamW.

Losses arrive as one number per trained token. They are reduced here and nowhere else: multiplied by the token's
weight, which already holds the denominator of the whole step (`functional.masking.loss_weights`), and summed over all
micro-batches, so that the gradient does not depend on how the batch was split, packed or ordered.

A loss that judges whole sequences (a pair of answers, a labelled answer, a solution with its steps) looks at a `Unit`
of them, which is never split between micro-batches and shares its prompt's tokens; it is one number per unit, with one
weight that holds the denominator of the whole step.

Shapes: N trained tokens, T packed tokens, D width; U units and B sequences of a micro-batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from upslope.data.batching import collate, padded_from_flat, split_by_tokens
from upslope.errors import RunError
from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.models.lora import dropping, packed_keys
from upslope.models.protocol import CausalModel, ScalarHead, evaluating
from upslope.training.optim import MasterAdamW
from upslope.types import Batch, Example


class Outputs(SimpleNamespace):
    """What a network says about the trained tokens of a micro-batch: the parts that were asked for, and no others.

    `name in outputs` tells which; reading another one is an AttributeError.

    logp_N: log-prob of each token. entropy_N, mean_logp_N: entropy, and mean log-prob, over the vocabulary. values_N:
    of the states in which the tokens were chosen. final_B: value of the state after each sequence's last token.
    hidden_ND: the states that predict the trained tokens.
    """

    logp_N: Tensor
    entropy_N: Tensor
    mean_logp_N: Tensor
    values_N: Tensor
    final_B: Tensor
    hidden_ND: Tensor

    def __contains__(self, name: str) -> bool:
        return name in vars(self)


Loss = Callable[[Batch, Outputs], tuple[Tensor, Mapping[str, Tensor]]]
"""(micro-batch, outputs) -> loss per trained token [N], and metrics per trained token [N] to be averaged alike.

Of units it is one number per unit [U], and so is the field "weight".
"""


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward pass over a packed micro-batch, and what is asked of it: `Forward(entropy=True)(model, batch)`.

    The head and the log-softmax see the trained positions only. `detach_trunk` keeps the value head's gradient out of
    the network below it; `train_final` lets gradient through final_B (a reward is read there), which is a constant
    otherwise.
    """

    temperature: float = 1.0
    logp: bool = True
    entropy: bool = False
    mean_logp: bool = False
    head: ScalarHead | None = None
    detach_trunk: bool = False
    train_final: bool = False
    hidden: bool = False

    def __call__(self, model: CausalModel, batch: Batch) -> Outputs:
        """Run it."""
        context = PackedContext(batch.lengths, batch.parents, device=batch.tokens_T.device)
        kept = batch.replay is not None and batch.replay.stands_for(model)
        hidden_TD = (batch.replay.hidden if kept else model)(batch.tokens_T, context)
        hidden_ND = hidden_TD.index_select(0, batch.rows_N)
        parts = {"hidden_ND": hidden_ND} if self.hidden else {}
        if self.logp:
            names = ["logp_N", *["entropy_N"] * self.entropy, *["mean_logp_N"] * self.mean_logp]
            found = linear_token_logprobs(
                hidden_ND,
                model.head_weight,
                batch.targets_N,
                temperature=self.temperature,
                with_entropy=self.entropy,
                with_mean=self.mean_logp,
            )
            parts |= zip(names, found if len(names) > 1 else [found], strict=True)
        if self.head is not None:
            parts["values_N"] = self.head(hidden_ND.detach() if self.detach_trunk else hidden_ND)
            if batch.ends_B is not None:
                final_BD = hidden_TD[batch.ends_B]
                parts["final_B"] = self.head(final_BD if self.train_final else final_BD.detach())
        return Outputs(**parts)


def score(model: CausalModel, batches: Iterable[Batch], forward: Forward = Forward()) -> Outputs:
    """What `forward` gives for every trained token, without gradient, concatenated in the order of the batches."""
    with evaluating(model, forward.head):
        found = [forward(model, batch) for batch in batches]
    return Outputs(**{name: torch.cat([getattr(out, name) for out in found]) for name in vars(found[0])})


def accumulate(
    model: Any,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor]]],
    forward: Callable[[Any, Any], Any] = Forward(),
    *,
    gap_to: str | None = None,
    share: float = 1.0,
    denominator: int = 1,
) -> dict[str, float]:
    """Add the gradient of the step's weighted loss to the parameters; returns the loss and the weighted metrics.

    forward: what `loss` is given of each micro-batch. Each batch's field "weight" holds the weight of every trained
    token, the whole step's denominator in it. `gap_to` names a field with log-probs of the same tokens and weights; how
    far they are is returned as `gap_metrics` names it. `share` is the part of the step's weight that the batches hold,
    where what has no gradient was left out: losses stay parts of the whole, other metrics are averaged over what is
    there. `denominator` divides every weight. Raises RunError at the first loss that is not finite, before any update.
    """
    totals: dict[str, float] = {"loss": 0.0}
    gaps: list[Tensor] = []
    for batch in batches:
        out = forward(model, batch)
        if gap_to is not None:
            gaps.append((batch.fields[gap_to] - out.logp_N.detach()).abs())
        loss_N, metrics = loss(batch, out)
        weight_N = batch.fields["weight"]
        total = (loss_N * weight_N).sum() / denominator
        value = float(total.detach())
        if not math.isfinite(value):
            raise RunError(f"the loss is {value}: stopped before the update, the last checkpoint is untouched")
        totals["loss"] += value
        for name, values in metrics.items():
            part = float((values.detach() * weight_N).sum())
            totals[name] = totals.get(name, 0.0) + part / (
                denominator if name.startswith("loss") else share * denominator
            )
        total.backward()
    return totals | (gap_metrics(torch.cat(gaps)) if gaps else {})


def gap_metrics(gap_N: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's for the same tokens and weights; 0 is on-policy."""
    return {
        "rollout/max_logprob_diff": float(gap_N.max()),
        "rollout/mean_logprob_diff": float(gap_N.mean()),
        "rollout/differing_tokens": float((gap_N != 0).sum()),
    }


def update(
    model: Any,
    optimizer: MasterAdamW,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor]]],
    forward: Callable[[Any, Any], Any] = Forward(),
    *,
    learning_rate: float,
    max_grad_norm: float,
    step: int | None = None,
    keys_of: Callable[[Any], Tensor] = packed_keys,
    gap_to: str | None = None,
    share: float = 1.0,
    denominator: int = 1,
) -> dict[str, float]:
    """One optimizer step over all micro-batches, as `accumulate`; of a `step` adapters have their dropout, by keys.

    Returns loss, metrics and the gradient norm before clipping. On RunError (a loss or gradient that is not finite)
    nothing has changed.
    """
    optimizer.zero_grad()
    try:
        with dropping(model, batches, keys_of, step) as prepared:
            totals = accumulate(model, prepared, loss, forward, gap_to=gap_to, share=share, denominator=denominator)
        totals["grad_norm"] = optimizer.step(learning_rate, max_norm=max_grad_norm)
    except RunError:
        optimizer.zero_grad()
        raise
    totals["learning_rate"] = learning_rate
    return totals


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
