"""Preferences without a reward model: DPO (arXiv 2305.18290), IPO (2310.12036), KTO (2402.01306), ORPO (2403.07691),
SimPO (2405.14734), in one loop.

    once: ref(y | x) of every row that the run will meet, by the policy before its first step
    for each step, over B rows (x, y_w, y_l):
        h    = log pi(y_w | x) - log ref(y_w | x) - log pi(y_l | x) + log ref(y_l | x)       sums over tokens
        loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)                         dpo; e: label_smoothing
               (h - 1 / (2 beta))^2                                                          ipo
               -m_w - beta log sigmoid(log odds m_w - log odds m_l)                          orpo, m: mean over tokens
               -log sigmoid(beta (m_w - m_l) - margin)                                       simpo
               - sft_coef m_w                                                                (2404.19733)
        averaged over the B rows of the step; AdamW step
    kto, rows (x, y, good or bad), g = log pi(y | x) - log ref(y | x):
        z0   = max(0, mean of g over the step's mismatched pairs (x, y'))                    no gradient, one pass first
        loss = w_d (1 - sigmoid(beta (g - z0))) or w_u (1 - sigmoid(beta (z0 - g)))

Log-probs of dpo, ipo and kto are sums, as in the papers (for IPO some libraries divide by the length). y' is the answer
of the next row of the data that has another prompt, fixed, so that its reference log-prob too is computed once. Nothing
of the reference stays in memory: it is the policy itself before training (its adapters off, where it has some).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy
from upslope.data.examples import Judged, Pair, judged_of, pairs_of
from upslope.functional.supervised_losses import dpo as dpo_loss
from upslope.functional.supervised_losses import ipo, kto, orpo, simpo
from upslope.loop.kept import DataAccount, within_context
from upslope.loop.preferences import PreferenceLearner, read_rows, right_of
from upslope.loop.session import Recipe
from upslope.options import DPOOptions
from upslope.options.finetune import SIMPO_MARGIN
from upslope.runs.progress import Progress
from upslope.training.step import Loss, Outputs, Unit, measure, sequence_logps, token_logps, unit_batches
from upslope.types import Batch

REFERENCED = ("dpo", "ipo", "kto")


class DPO(PreferenceLearner):
    """Direct preference optimization and its relatives."""

    options: DPOOptions

    def __init__(self, options: DPOOptions, policy: Policy) -> None:
        rows, held_out, account = load_rows(within_context(options, policy), policy.tokenizer)
        self.mismatched = [Unit((row.mismatched,)) for row in rows if isinstance(row, Judged)]
        self.mismatched_held_out = [Unit((row.mismatched,)) for row in held_out if isinstance(row, Judged)]
        units, held_units = [unit_of(row) for row in rows], [unit_of(row) for row in held_out]
        super().__init__(options, policy, units, held_units, account)
        if options.loss in REFERENCED:
            self._attach_reference()

    def _attach_reference(self) -> None:
        """Give every row that the run will meet the reference's log-prob of each trained token."""
        o = self.options
        met = sorted({self.order.at(p) for p in range(min(len(self.units), o.max_steps * o.batch_size))})
        wanted = [self.units[i] for i in met] + self.held_out
        if o.loss == "kto":
            wanted += [self.mismatched[i] for i in met] + self.mismatched_held_out
        model = self.policy.model
        reference = nullcontext(model) if self.policy.lora is None else self.policy.as_reference()
        with reference as network, Progress(len(wanted), "reference", unit="row") as progress:
            for i, parts in token_logps(network, wanted, o.micro_batch_tokens, device=model.device):
                for example, logp in zip(wanted[i].examples, parts, strict=True):
                    example.fields["ref_logprobs"] = logp
                progress.advance()

    def loss_of(self, units: Sequence[Unit], indices: Sequence[int] | None) -> tuple[Loss, dict[str, float]]:
        """The loss of the options; kto's with the KL of these rows' mismatched pairs."""
        if self.options.loss != "kto":
            return partial(pair_loss, self.options), {}
        mismatched = self.mismatched_held_out if indices is None else [self.mismatched[i] for i in indices]
        kl = self._kl(mismatched)
        good = sum(unit.values["desirable"] for unit in units) / len(units)
        return partial(label_loss, self.options, kl, good), {"objective/kl": kl}

    def _kl(self, mismatched: Sequence[Unit]) -> float:
        """KTO's z0: max(0, mean log-ratio of the mismatched pairs), over all of them whatever the micro-batches."""
        model = self.policy.model
        batches = unit_batches(mismatched, self.options.micro_batch_tokens, device=model.device)
        ratios = measure(model, batches, _log_ratio)["loss"]
        return max(0.0, float(ratios.double().mean()))


def pair_loss(o: DPOOptions, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Loss and metrics of each pair [U]; sequences stand chosen, rejected, chosen, rejected."""
    beta = o.strength
    sums_B, counts_B = sequence_logps(out.logp_N, batch)
    means_B = sums_B / counts_B
    if o.loss in REFERENCED:
        ref_B, _ = sequence_logps(batch.fields["ref_logprobs"], batch)
        four = (sums_B[0::2], sums_B[1::2], ref_B[0::2], ref_B[1::2])
        rewards_B, logps_B = beta * (sums_B - ref_B), sums_B
        if o.loss == "dpo":
            loss_U = dpo_loss(*four, beta=beta, label_smoothing=o.label_smoothing)
        else:
            loss_U = ipo(*four, beta=beta)
    else:
        rewards_B, logps_B = beta * means_B, means_B
        if o.loss == "orpo":
            loss_U = orpo(means_B[0::2], means_B[1::2], lam=beta)
        else:
            margin = SIMPO_MARGIN if o.margin is None else o.margin
            loss_U = simpo(means_B[0::2], means_B[1::2], beta=beta, margin=margin)
    margins_U = rewards_B[0::2] - rewards_B[1::2]
    metrics = {
        "rewards/chosen": rewards_B[0::2],
        "rewards/rejected": rewards_B[1::2],
        "rewards/margins": margins_U,
        "rewards/accuracies": right_of(margins_U),
        "logps/chosen": logps_B[0::2],
        "logps/rejected": logps_B[1::2],
    }
    if o.sft_coef:
        metrics["loss/preference"] = loss_U
        loss_U = loss_U - o.sft_coef * means_B[0::2]
    return loss_U, metrics


def label_loss(
    o: DPOOptions, kl: float, good: float, batch: Batch, out: Outputs
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """KTO's loss and metrics of each labelled answer [U]; `good` is the share of good ones among all it averages over.

    Means over the good (or bad) answers alone are logged as chosen (rejected): each counts for 1 / share.
    """
    beta = o.strength
    sums_U, _ = sequence_logps(out.logp_N, batch)
    ref_U, _ = sequence_logps(batch.fields["ref_logprobs"], batch)
    desirable_U = batch.fields["desirable"] > 0
    loss_U = kto(
        sums_U,
        ref_U,
        desirable_U,
        kl,
        beta=beta,
        desirable_weight=o.desirable_weight,
        undesirable_weight=o.undesirable_weight,
    )
    ratio_U = (sums_U - ref_U).detach()
    metrics = {"rewards/accuracies": right_of(torch.where(desirable_U, ratio_U - kl, kl - ratio_U))}
    for name, mask_U, share in (("chosen", desirable_U, good), ("rejected", ~desirable_U, 1 - good)):
        if share > 0:
            metrics[f"rewards/{name}"] = torch.where(mask_U, beta * ratio_U / share, 0.0)
            metrics[f"logps/{name}"] = torch.where(mask_U, sums_U.detach() / share, 0.0)
    if 0 < good < 1:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return loss_U, metrics


def _log_ratio(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    return sequence_logps(out.logp_N, batch)[0] - sequence_logps(batch.fields["ref_logprobs"], batch)[0], {}


def unit_of(row: Pair | Judged) -> Unit:
    """The sequences of a row that one loss looks at."""
    if isinstance(row, Pair):
        return Unit((row.chosen, row.rejected))
    return Unit((row.example,), {"desirable": float(row.desirable)})


def load_rows(
    options: DPOOptions, tokenizer: Any
) -> tuple[list[Pair] | list[Judged], list[Pair] | list[Judged], DataAccount]:
    """Training and held-out rows of the kind that the loss takes, and what became of every row."""
    return read_rows(options, tokenizer, judged_of if options.loss == "kto" else pairs_of)


dpo = Recipe("dpo", DPO.of)
