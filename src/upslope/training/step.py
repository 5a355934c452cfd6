"""One optimizer update: forward over packed micro-batches, one global denominator, clip, AdamW.

Losses arrive as one number per trained token. They are reduced here and nowhere else: multiplied by the token's
weight, which already holds the denominator of the whole step (`functional.masking.loss_weights`), and summed over all
micro-batches, so that the gradient does not depend on how the batch was split, packed or ordered.

Shapes: N trained tokens, T packed tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upslope.errors import RunError
from upslope.functional.logprobs import linear_token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.models.heads import ScalarHead
from upslope.models.lora_dropout import dropping, packed_keys
from upslope.models.protocol import CausalModel
from upslope.training.optim import MasterAdamW
from upslope.types import Batch

__all__ = ["Loss", "Outputs", "evaluating", "forward", "gap_metrics", "score", "update"]


@dataclass(slots=True)
class Outputs:
    """What a network says about the trained tokens of one micro-batch; parts that were not asked for are None.

    mean_logp_N: the mean log-prob over the vocabulary. values_N: of the states in which the tokens were chosen.
    final_B: of the state after each sequence's last token. hidden_ND: the states that predict the trained tokens.
    """

    logp_N: Tensor | None = None
    entropy_N: Tensor | None = None
    values_N: Tensor | None = None
    final_B: Tensor | None = None
    mean_logp_N: Tensor | None = None
    hidden_ND: Tensor | None = None


Loss = Callable[[Batch, Outputs], tuple[Tensor, Mapping[str, Tensor]]]
"""(micro-batch, outputs) -> loss per trained token [N], and metrics per trained token [N] to be averaged alike.

Where one loss judges whole sequences (training/units.py) it is one number per unit [U], and so is the field "weight".
"""


def forward(
    model: CausalModel,
    batch: Batch,
    *,
    temperature: float = 1.0,
    logp: bool = True,
    entropy: bool = False,
    mean_logp: bool = False,
    head: ScalarHead | None = None,
    detach_trunk: bool = False,
    train_final: bool = False,
    hidden: bool = False,
) -> Outputs:
    """Run one packed micro-batch; the head and the log-softmax see the trained positions only.

    `detach_trunk` keeps the value head's gradient out of the network below it; `train_final` lets gradient through
    final_B (a reward is read there), which is a constant otherwise.
    """
    context = PackedContext(batch.lengths, batch.parents, device=batch.tokens_T.device)
    kept = batch.replay is not None and batch.replay.stands_for(model)
    hidden_TD = (batch.replay.hidden if kept else model)(batch.tokens_T, context)
    hidden_ND = hidden_TD.index_select(0, batch.rows_N)
    out = Outputs(hidden_ND=hidden_ND if hidden else None)
    if entropy or mean_logp:
        out.logp_N, *further = linear_token_logprobs(
            hidden_ND,
            model.head_weight,
            batch.targets_N,
            temperature=temperature,
            with_entropy=entropy,
            with_mean=mean_logp,
        )
        out.mean_logp_N = further.pop() if mean_logp else None
        out.entropy_N = further.pop() if entropy else None
    elif logp:
        out.logp_N = linear_token_logprobs(hidden_ND, model.head_weight, batch.targets_N, temperature=temperature)
    if head is not None:
        out.values_N = head(hidden_ND.detach() if detach_trunk else hidden_ND)
        if batch.ends_B is not None:
            final_BD = hidden_TD[batch.ends_B]
            out.final_B = head(final_BD if train_final else final_BD.detach())
    return out


@contextmanager
def evaluating(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Dropout off and no gradient, and the previous modes back afterwards."""
    real = [m for m in modules if m is not None]
    modes = [m.training for m in real]
    for module in real:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(real, modes, strict=True):
            module.train(mode)


def score(
    model: CausalModel,
    batches: Iterable[Batch],
    *,
    temperature: float = 1.0,
    logp: bool = True,
    head: ScalarHead | None = None,
) -> Outputs:
    """Log-probs and values of every trained token, without gradient, concatenated in the order of the batches."""
    with evaluating(model, head):
        parts = [forward(model, batch, temperature=temperature, logp=logp, head=head) for batch in batches]

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    return Outputs(logp_N=joined("logp_N"), values_N=joined("values_N"), final_B=joined("final_B"))


def accumulate(
    model: CausalModel,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    mean_logp: bool = False,
    head: ScalarHead | None = None,
    logp: bool = True,
    detach_trunk: bool = False,
    train_final: bool = False,
    hidden: bool = False,
    gap_to: str | None = None,
    share: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of the step's weighted loss to the parameters; returns the loss and the weighted metrics.

    Each batch's field "weight" holds the weight of every trained token, the whole step's denominator in it. `gap_to`
    names a field with log-probs of the same tokens and weights; how far they are is returned as `gap_metrics` names it.
    `share` is the part of the step's weight that the batches hold, where what has no gradient was left out: losses
    stay parts of the whole, other metrics are averaged over what is there.
    Raises RunError at the first loss that is not finite, before any update.
    """
    totals: dict[str, float] = {"loss": 0.0}
    found: list[Tensor] = []
    for batch in batches:
        out = forward(
            model,
            batch,
            temperature=temperature,
            logp=logp,
            entropy=entropy,
            mean_logp=mean_logp,
            head=head,
            detach_trunk=detach_trunk,
            train_final=train_final,
            hidden=hidden,
        )
        if gap_to is not None and out.logp_N is not None:
            found.append((batch.fields[gap_to] - out.logp_N.detach()).abs())
        loss_N, metrics = loss(batch, out)
        weight_N = batch.fields["weight"]
        total = (loss_N * weight_N).sum()
        value = float(total.detach())
        if value != value or abs(value) == float("inf"):
            raise RunError(f"the loss is {value}: stopped before the update, the last checkpoint is untouched")
        totals["loss"] += value
        for name, values in metrics.items():
            part = float((values.detach() * weight_N).sum())
            totals[name] = totals.get(name, 0.0) + (part if name.startswith("loss") else part / share)
        total.backward()
    return totals | (gap_metrics(torch.cat(found)) if found else {})


def gap_metrics(gap_N: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's for the same tokens and weights; 0 is on-policy."""
    return {
        "rollout/max_logprob_diff": float(gap_N.max()),
        "rollout/mean_logprob_diff": float(gap_N.mean()),
        "rollout/differing_tokens": float((gap_N != 0).sum()),
    }


def update(
    model: CausalModel,
    optimizer: MasterAdamW,
    batches: Iterable[Batch],
    loss: Loss,
    *,
    learning_rate: float,
    max_grad_norm: float,
    step: int | None = None,
    **what: Any,
) -> dict[str, float]:
    """One optimizer step over all micro-batches; `what` goes to `accumulate`; of a `step` adapters have their dropout.

    Returns loss, metrics and the gradient norm before clipping. On RunError (a loss or gradient that is not finite)
    nothing has changed.
    """
    optimizer.zero_grad()
    try:
        with dropping(model, batches, packed_keys, step) as prepared:
            totals = accumulate(model, prepared, loss, **what)
        totals["grad_norm"] = optimizer.step(learning_rate, max_norm=max_grad_norm)
    except RunError:
        optimizer.zero_grad()
        raise
    totals["learning_rate"] = learning_rate
    return totals
