"""Policy losses: what each token's likelihood costs.

Each is a function here and a name in options/policy.py, or a function in a user's file. It takes a LossInput and
returns the loss per trained token [N]; KL, value and entropy terms, the correction for the sampler and the mean over
the step are the recipe's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upslope.data.batching import padded_from_flat
from upslope.errors import DataError
from upslope.functional.policy_losses import (
    clipped_is_reinforce,
    clipped_surrogate,
    sequence_clipped_surrogate,
    soft_gated,
)
from upslope.training.step import Outputs
from upslope.types import Batch


@dataclass(frozen=True, slots=True)
class LossInput:
    """What a loss sees of a micro-batch: its N trained tokens, which belong to B sequences, in their order.

    logprobs: of the policy as it is, with its gradient. old_logprobs: of the policy before the step's first update.
    ref_logprobs: of the reference model, None where there is none. advantages: of each token. sequence_N: the sequence,
    0 to B - 1, that each token belongs to. options: the verb's, as in `options.epsilon`.
    """

    options: Any
    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    sequence_N: Tensor

    @classmethod
    def of(cls, options: Any, batch: Batch, out: Outputs) -> LossInput:
        """Of a micro-batch and what the network said of it."""
        f = batch.fields
        return cls(options, out.logp_N, f["old_logprobs"], f.get("ref_logprobs"), f["advantages"], batch.sequence_N)

    @property
    def clip(self) -> dict[str, float]:
        """The clip range of the ratio below and above 1."""
        o = self.options
        return {"clip_low": o.epsilon, "clip_high": o.epsilon if o.epsilon_high is None else o.epsilon_high}

    @property
    def lengths_B(self) -> Tensor:
        """Trained tokens of each sequence."""
        return self.sequence_N.bincount()

    def padded(self, x_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N] -> [B, T], 0 where a sequence has ended, and the mask [B, T]."""
        return padded_from_flat(x_N, self.sequence_N, int(self.sequence_N[-1]) + 1)


PolicyLoss = Callable[[LossInput], Tensor]


def clipped(x: LossInput) -> Tensor:
    """PPO (1707.06347); with dual_clip its bound for bad actions (1912.09729)."""
    dual = getattr(x.options, "dual_clip", None)
    return clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages, **x.clip, dual_clip=dual)


def gspo(x: LossInput) -> Tensor:
    """GSPO (2507.18071): each sequence's loss, given to each of its tokens, so that their mean is the sequence's."""
    logp_BT, mask_BT = x.padded(x.logprobs)
    old_BT, _ = x.padded(x.old_logprobs)
    advantages_BT, _ = x.padded(x.advantages)
    return sequence_clipped_surrogate(logp_BT, old_BT, advantages_BT[:, 0], mask_BT, **x.clip)[x.sequence_N]


def cispo(x: LossInput) -> Tensor:
    """CISPO (2506.13585): the ratio is capped as a weight, so every token keeps its gradient."""
    return clipped_is_reinforce(x.logprobs, x.old_logprobs, x.advantages, clip_high=x.clip["clip_high"])


def sapo(x: LossInput) -> Tensor:
    """SAPO (2511.20347): a smooth gate in place of the clip."""
    o = x.options
    return soft_gated(
        x.logprobs, x.old_logprobs, x.advantages, tau_positive=o.tau_positive, tau_negative=o.tau_negative
    )


def policy_loss(loss: PolicyLoss, options: Any, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, corrected where the sampler's policy was another, and what it says of the ratio, per token [N]."""
    x = LossInput.of(options, batch, out)
    loss_N = loss(x)
    if loss_N.shape != x.logprobs.shape:
        wanted, found = list(x.logprobs.shape), list(loss_N.shape)
        raise DataError(f"loss = {options.loss}: its shape is {found}; it must be {wanted}, one for each trained token")
    if "importance" in batch.fields:
        loss_N = loss_N * batch.fields["importance"]
    return loss_N, {"loss/policy": loss_N, **_ratio_metrics(x)}


def _ratio_metrics(x: LossInput) -> Mapping[str, Tensor]:
    """KL to the policy before the update (k3), whether the clip removes the gradient, the ratio."""
    log_ratio = x.logprobs.detach() - x.old_logprobs
    ratio, low, high = log_ratio.exp(), *x.clip.values()
    clipped = ((x.advantages > 0) & (ratio > 1 + high)) | ((x.advantages < 0) & (ratio < 1 - low))
    return {"policy/approx_kl": ratio - 1 - log_ratio, "policy/clipfrac": clipped.float(), "val/ratio": ratio}
