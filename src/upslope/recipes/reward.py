"""Reward models: a scalar head on a language model, trained on comparisons or on labelled steps.

    outcome (Bradley-Terry; Stiennon et al. 2020, 2009.01325; Ouyang et al. 2022, 2203.02155), B rows (x, y_w, y_l):
        r    = w . hidden state after the last token of (x, y), which is the token that ends the turn
        loss = -log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2      margin: 2307.09288, centering: 2312.09244
    process (Lightman et al. 2023, 2305.20050; Math-Shepherd, 2312.08935), rows (x, steps, labels c_k in [0, 1]):
        p_k  = sigmoid(w . hidden state after the token that ends step k)
        loss = -c_k log p_k - (1 - c_k) log(1 - p_k)
    averaged over all rows (steps) of the optimizer step; AdamW step

w starts from N(0, 1 / (D + 1)), which is a variance (2403.17031), and has no bias: a comparison cannot see one. The
folder is transformers' sequence classifier with one label; adapters are merged into it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.data.examples import Pair, Solution, pairs_of, solutions_of
from upslope.functional.supervised_losses import bradley_terry
from upslope.loop.kept import DataAccount, within_context
from upslope.loop.preferences import PreferenceLearner, read_rows, right_of
from upslope.loop.session import Recipe
from upslope.models.files.config_json import SCORE
from upslope.models.files.loading import (
    RewardSettings,
    check_can_be_saved,
    save_reward_folder,
    score_head,
    stored_score,
)
from upslope.models.files.weights import load as load_weights
from upslope.models.protocol import ScalarHead
from upslope.options import RewardOptions
from upslope.training.optim import Group
from upslope.training.step import Forward, Loss, Outputs, Unit, after_tokens
from upslope.types import Batch, Example


class RewardLearner(PreferenceLearner):
    """A network and its scalar head, by comparisons (outcome) or by labelled steps (process)."""

    options: RewardOptions

    @classmethod
    def of(cls, options: RewardOptions, policy: Policy | None = None) -> Self:
        """What a run with these options trains; a `policy` already loaded becomes a reward model."""
        return cls(options, policy or load_policy(options, trunk=True))

    def __init__(self, options: RewardOptions, policy: Policy) -> None:
        check_can_be_saved(policy.model)
        units, held_out, account = load_units(within_context(options, policy), policy.tokenizer)
        self.head = head = start_head(policy, options.seed)
        self.forward = Forward(logp=False, head=head, train_final=True)
        for name, parameter in policy.model.named_parameters():
            if name == "lm_head.weight":  # the words' head is not in a reward model
                parameter.requires_grad_(False)
        group = Group({SCORE: head.get_parameter(SCORE)}, weight_decay=options.weight_decay)
        super().__init__(options, policy, units, held_out, account, extra=[group])

    def loss_of(self, units: Sequence[Unit], indices: Sequence[int] | None) -> tuple[Loss, dict[str, float]]:
        """Bradley-Terry over pairs, or cross-entropy over steps."""
        return (partial(pair_loss, self.options) if self.options.kind == "outcome" else step_loss), {}

    def calibration(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Of an outcome model: what its sigmoid(r_w - r_l) is worth as the probability that y_w is preferred."""
        return pair_calibration(found["rewards/margins"]) if self.options.kind == "outcome" else {}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments; with adapters also head and adapters, as the folder holds them merged."""
        own = {"adapters": self.optimizer.weights()} if self.policy.lora is not None else {}
        return {**super().tensors(), **own}

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint, the head among them."""
        return tensors["adapters"] if self.policy.lora is not None else load_weights(model, torch.float32)

    def write_model(self, folder: Path) -> None:
        """Network and head in float32, as transformers' sequence classifier."""
        policy, o = self.policy, self.options
        weights = self.optimizer.weights()
        save_reward_folder(
            policy.model,
            weights if policy.lora is None else merged(policy, weights),
            folder,
            RewardSettings(o.kind, o.aggregate),
            source_folder=policy.folder,
            pad_token_id=_pad_token(policy),
        )


def start_head(policy: Policy, seed: int) -> ScalarHead:
    """The head of a reward model that is trained further, else N(0, 1 / (D + 1)), a pure function of the seed."""
    width = policy.model.spec.hidden_size
    weight = stored_score(policy.folder)
    if weight is None:
        weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
    return score_head(width, weight).to(policy.model.device)


def pair_loss(o: RewardOptions, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Bradley-Terry of each pair [U]; sequences stand chosen, rejected, chosen, rejected."""
    chosen_U, rejected_U = out.final_B[0::2], out.final_B[1::2]
    loss_U = bradley_terry(chosen_U, rejected_U, margin=batch.fields["margin"], centering=o.centering)
    return loss_U, {
        "rewards/chosen": chosen_U,
        "rewards/rejected": rejected_U,
        "rewards/margins": chosen_U - rejected_U,
        "rewards/accuracies": right_of(chosen_U - rejected_U),
    }


def step_loss(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The sum of each solution's cross-entropies at its step ends [U]; labels may be shares between 0 and 1."""
    label_N = batch.fields["label"]
    ends_N = ~label_N.isnan()
    logit_N = torch.where(ends_N, after_tokens(out.values_N, out.final_B, batch), 0.0)
    target_N = torch.where(ends_N, label_N, 0.0)
    loss_N = F.binary_cross_entropy_with_logits(logit_N, target_N, reduction="none")
    right_N = (logit_N > 0) == (target_N > 0.5)
    probability_N = logit_N.detach().sigmoid()

    def summed(x_N: Tensor) -> Tensor:
        total = torch.zeros(len(batch.ends_B), dtype=loss_N.dtype, device=loss_N.device)
        return total.index_add(0, batch.sequence_N, torch.where(ends_N, x_N.to(loss_N.dtype), 0.0))

    return summed(loss_N), {
        "rewards/accuracies": summed(right_N),
        "rewards/steps": summed(probability_N),
        "brier": summed((probability_N - target_N).square()),
    }


def pair_calibration(margins_U: Tensor, bins: int = 10) -> dict[str, float]:
    """Brier score of p = sigmoid(margin) (0 is perfect, 0.25 a coin) and expected calibration error over `bins`.

    The error is the mean gap between how sure the model is of its choice, max(p, 1 - p), and how often it is right
    (Guo et al. 2017, 1706.04599, eq. 3).
    """
    p_U = margins_U.double().sigmoid()
    sure_U, right_U = torch.maximum(p_U, 1 - p_U), right_of(margins_U.double())
    bin_U = ((sure_U - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_U, right_U - sure_U)
    return {"brier": float((1 - p_U).square().mean()), "calibration_error": float(gaps.abs().sum()) / len(p_U)}


def merged(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Start weights plus alpha / rank times B A of every adapted layer, in float32, under the plain names."""
    plain = {n: x for n, x in load_weights(policy.folder, torch.float32).items() if n not in ("lm_head.weight", SCORE)}
    scale = policy.lora.lora_alpha / policy.lora.r
    for name, down in weights.items():
        if name.endswith(".lora_A.default.weight"):
            layer = name.removesuffix(".lora_A.default.weight")
            up = weights[f"{layer}.lora_B.default.weight"]
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + scale * (up.cpu() @ down.cpu())
    return {**plain, SCORE: weights[SCORE]}


def load_units(options: RewardOptions, tokenizer: Any) -> tuple[list[Unit], list[Unit], DataAccount]:
    """Training and held-out rows as units, and what became of every row."""
    if options.kind == "process":
        solutions, held_out, account = read_rows(options, tokenizer, solutions_of)
        return [_solution(row) for row in solutions], [_solution(row) for row in held_out], account
    pairs, held_pairs, account = read_rows(options, tokenizer, pairs_of)
    return [_pair(row, options.margin) for row in pairs], [_pair(row, options.margin) for row in held_pairs], account


def _pair(row: Pair, margin: float) -> Unit:
    return Unit((row.chosen, row.rejected), {"margin": margin if row.margin is None else row.margin})


def _solution(row: Solution) -> Unit:
    example = Example(row.example.tokens, row.example.mask, {"label": row.labels})
    return Unit((example,), terms=sum(label == label for label in row.labels))


def _pad_token(policy: Policy) -> int | None:
    pad = policy.tokenizer.pad_token_id
    return None if pad is None or pad in policy.eos_token_ids else int(pad)


reward = Recipe("reward", RewardLearner.of)
