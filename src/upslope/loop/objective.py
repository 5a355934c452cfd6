"""The objective of a policy gradient: how much better each token was than expected, and what its likelihood costs.

Each advantage and each loss is a function here and a name in options/policy.py, or a function in a user's file. An
advantage takes an AdvantageInput and returns advantages [B, T] or, one for all tokens of a sequence, [B]; with a critic
it may return (advantages, returns) instead: what the critic is to say, else advantages + values. A loss takes a
LossInput and returns the loss per trained token [N]; KL, value and entropy terms, the correction for the sampler and
the mean over the step are the recipe's.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from upslope import plugins
from upslope.config import in_text
from upslope.data.batching import padded_from_flat
from upslope.errors import DataError
from upslope.functional.advantages import group_centered, group_normalized, leave_one_out
from upslope.functional.masking import whiten
from upslope.functional.metrics import token_ratios
from upslope.functional.policy_losses import (
    clipped_is_reinforce,
    clipped_surrogate,
    sequence_clipped_surrogate,
    soft_gated,
)
from upslope.functional.returns import gae as generalized
from upslope.functional.returns import n_step_advantages
from upslope.functional.returns import vtrace as v_trace
from upslope.training.experience import Experience, group_rewards
from upslope.training.step import Outputs
from upslope.types import Batch


@dataclass(frozen=True, slots=True)
class AdvantageInput:
    """The judged trajectories of one step: B sequences of at most T trained tokens, answers to `num_groups` prompts.

    rewards_B: of each sequence, penalties included. rewards_BT: the same along its tokens, with rewards of single steps
    at their own, minus the KL where it is part of the reward. options: the verb's, as in `options.gamma`.
    """

    options: Any
    x: Experience
    rewards_B: Tensor
    rewards_BT: Tensor
    num_groups: int

    @property
    def mask_BT(self) -> Tensor:
        """True where there is a token."""
        return self.x.mask_BT

    @property
    def lengths_B(self) -> Tensor:
        """Trained tokens of each sequence."""
        return self.mask_BT.sum(1)

    @property
    def values_BT(self) -> Tensor:
        """The critic's value of the state in which each token was chosen. DataError: there is no critic."""
        if "values" not in self.x.columns():
            raise DataError("there are values only where there is a critic, in ppo")
        return self.x.padded(self.x.values)

    @property
    def bootstrap_B(self) -> Tensor | None:
        """The value of the state after a sequence that was cut, else 0; None where every end is an end."""
        return self.x.bootstrap_B

    @property
    def log_ratio_BT(self) -> Tensor:
        """log pi_old - log mu, of the policy before the update and the distribution that was sampled from."""
        return self.x.padded(self.x.old_logprobs - self.x.sampling_logprobs)

    def by_group(self, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """formula(rewards_PG, mask_PG) -> advantages_PG, brought back to the sequences, [B]."""
        rewards_PG, mask_PG, place_B = group_rewards(self.x, self.rewards_B, self.num_groups)
        return formula(rewards_PG, mask_PG).flatten()[place_B]


Advantage = Callable[[AdvantageInput], Tensor | tuple[Tensor, Tensor]]


def gae(a: AdvantageInput) -> Tensor:
    """GAE (1506.02438)."""
    o = a.options
    return generalized(a.rewards_BT, a.values_BT, a.mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=a.bootstrap_B)


def n_step(a: AdvantageInput) -> Tensor:
    """The rewards of n tokens, then the critic's value, minus its value now (1602.01783)."""
    o = a.options
    return n_step_advantages(a.rewards_BT, a.values_BT, a.mask_BT, gamma=o.gamma, n=o.n_step, bootstrap_B=a.bootstrap_B)


def vtrace(a: AdvantageInput) -> tuple[Tensor, Tensor]:
    """V-trace (1802.01561): corrected, inside the estimator, for rollouts of older weights."""
    o = a.options
    return v_trace(
        a.log_ratio_BT,
        a.rewards_BT,
        a.values_BT,
        a.mask_BT,
        gamma=o.gamma,
        lam=o.lam,
        rho_clip=o.rho_clip,
        c_clip=o.c_clip,
        bootstrap_B=a.bootstrap_B,
    )


def grpo(a: AdvantageInput) -> Tensor:
    """The group's rewards, centred and divided by their deviation (2402.03300)."""
    return a.by_group(group_normalized)


def dr_grpo(a: AdvantageInput) -> Tensor:
    """The group's rewards, centred (2503.20783)."""
    return a.by_group(group_centered)


def rloo(a: AdvantageInput) -> Tensor:
    """The reward minus the mean of the group's others (2402.14740)."""
    return a.by_group(leave_one_out)


def reinforce_plus_plus(a: AdvantageInput) -> Tensor:
    """Centred in the group, then whitened over the batch (2501.03262, with a baseline)."""
    return a.by_group(lambda rewards_PG, mask_PG: whiten(group_centered(rewards_PG, mask_PG), mask_PG))


def _asked(kind: str, function: Callable[[Any], Any], given: Any, tensors: dict[str, Tensor]) -> Any:
    """What a function of the tables or of the user's returns. DataError: a user's raises, or changes what it reads."""
    versions = {name: x._version for name, x in tensors.items()}
    try:
        found = function(given)
    except (Exception, SystemExit) as error:
        if getattr(function, "__module__", None) == __name__:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        inside = [frame for frame in frames if frame.filename == frames[:2][-1].filename]  # the user's file
        at = f"{inside[-1].filename}:{inside[-1].lineno}: {type(error).__name__}: {plugins.first_line(error)}"
        raise _refused(kind, given.options, at) from error
    for name, x in tensors.items():
        if x._version != versions[name]:
            raise _refused(kind, given.options, f"it changes {name} in place; work on a copy")
    return found


def _refused(kind: str, options: Any, why: str) -> DataError:
    return DataError(f"{kind} = {in_text(kind, getattr(options, kind))}: {why}")


def _fits(x: Any, shape: torch.Size) -> bool:
    return isinstance(x, Tensor) and x.shape == shape and x.is_floating_point()


def _kind_of(x: Any) -> str:
    return f"shape {list(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else f"type {type(x).__name__}"


def estimate(advantage: Advantage, a: AdvantageInput) -> Tensor:
    """Advantages [B, T]; with a critic the experience's returns are filled in. DataError: what does not fit."""
    columns = a.x.columns()
    found = _asked("advantage", advantage, a, columns | {"rewards_B": a.rewards_B, "rewards_BT": a.rewards_BT})
    advantages_BT, returns_BT = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    mask_BT = a.mask_BT
    if _fits(advantages_BT, mask_BT.shape[:1]):
        advantages_BT = advantages_BT[:, None].expand(mask_BT.shape)
    given = {"advantages": advantages_BT} | ({} if returns_BT is None else {"returns": returns_BT})
    for name, x_BT in given.items():
        if not _fits(x_BT, mask_BT.shape):
            one = f", or [{len(mask_BT)}], one for each sequence" if name == "advantages" else ""
            wanted = f"floats of shape {list(mask_BT.shape)}, sequences by tokens{one}"
            raise _refused("advantage", a.options, f"{name} of {_kind_of(x_BT)}; they must be {wanted}")
    if "values" in columns:
        a.x.returns = a.x.unpadded(advantages_BT + a.values_BT if returns_BT is None else returns_BT)
    elif returns_BT is not None:
        raise _refused("advantage", a.options, "returns are for a critic, and there is none here")
    return advantages_BT


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
    def of(cls, options: Any, batch: Batch, out: Outputs) -> Self:
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


def corrected(loss: PolicyLoss, options: Any, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, corrected where the sampler's policy was another, and what it says of the ratio, per token [N]."""
    x = LossInput.of(options, batch, out)
    read = {name: getattr(x, name) for name in ("logprobs", "old_logprobs", "advantages")}
    loss_N = _asked("loss", loss, x, read)
    if not _fits(loss_N, x.logprobs.shape):
        wanted = f"floats of shape {list(x.logprobs.shape)}, one for each trained token"
        raise _refused("loss", options, f"it is of {_kind_of(loss_N)}; it must be {wanted}")
    if x.logprobs.requires_grad and not loss_N.requires_grad:
        raise _refused("loss", options, "it has no gradient; compute it from x.logprobs, not detached")
    if "importance" in batch.fields:
        loss_N = loss_N * batch.fields["importance"]
    ratio, approx_kl, clipped = token_ratios(x.logprobs, x.old_logprobs, x.advantages, **x.clip)
    ratios = {"policy/approx_kl": approx_kl, "policy/clipfrac": clipped.float(), "val/ratio": ratio}
    return loss_N, {"loss/policy": loss_N, **ratios}


def with_value_and_entropy(
    options: Any, loss_N: Tensor, metrics: dict[str, Tensor], batch: Batch, out: Outputs, critic: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """What shares a policy loss's backward pass: the loss of a critic on the policy's trunk, and the entropy bonus."""
    if critic is not None and critic.head is not None:
        value_N, said = critic.loss(batch, out)
        # With vf_coef = 0 the trunk is detached: the head alone learns, at full weight.
        loss_N, metrics = loss_N + (options.vf_coef or 1.0) * value_N, metrics | said
    if options.entropy_coef:
        loss_N = loss_N - options.entropy_coef * out.entropy_N
        metrics = {**metrics, "policy/entropy": out.entropy_N}
    return loss_N, metrics
