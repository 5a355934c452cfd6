"""Advantages: how much better each token (or sequence) was than expected.

Each is a function here and a name in options/policy.py, or a function in a user's file. It takes an AdvantageInput and
returns advantages [B, T] or, one for all tokens of a sequence, [B]; with a critic it may return (advantages, returns)
instead: what the critic is to say, else advantages + values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upslope.errors import DataError
from upslope.functional.advantages import group_centered, group_normalized, leave_one_out
from upslope.functional.masking import whiten
from upslope.functional.returns import gae as generalized
from upslope.functional.returns import n_step_advantages
from upslope.functional.returns import vtrace as v_trace
from upslope.training.experience import Experience, group_rewards


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
        """The critic's value of the state in which each token was chosen; only where there is a critic."""
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


def estimate(advantage: Advantage, a: AdvantageInput) -> Tensor:
    """Advantages [B, T]; with a critic the experience's returns are filled in. DataError: a shape that does not fit."""
    found = advantage(a)
    advantages, returns_BT = found if isinstance(found, tuple) else (found, None)
    mask_BT = a.mask_BT
    advantages_BT = advantages[:, None].expand(mask_BT.shape) if advantages.dim() == 1 else advantages
    for name, x_BT in {"advantages": advantages_BT, "returns": returns_BT}.items():
        if x_BT is not None and x_BT.shape != mask_BT.shape:
            raise DataError(
                f"advantage = {a.options.advantage}: {name} of shape {list(x_BT.shape)}; they must be "
                f"{list(mask_BT.shape)}, sequences by tokens, or [{len(mask_BT)}], one for each sequence"
            )
    if "values" in a.x.columns():
        a.x.returns = a.x.unpadded(advantages_BT + a.values_BT if returns_BT is None else returns_BT)
    return advantages_BT
