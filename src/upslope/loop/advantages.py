"""Advantages: how much better each token (or sequence) was than expected. One function and one row of a table each.

A function takes an AdvantageInput and returns advantages [B, T] or, one for all tokens of a sequence, [B]; with a
critic it may return (advantages, returns) instead: what the critic is to say, else advantages + values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upslope.errors import DataError
from upslope.functional.advantages import group_centered, group_normalized, leave_one_out
from upslope.functional.masking import whiten
from upslope.functional.returns import gae, n_step_advantages, vtrace
from upslope.training.experience import Experience, group_rewards

__all__ = ["CRITIC_ADVANTAGES", "GROUP_ADVANTAGES", "Advantage", "AdvantageInput", "estimate"]


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


def generalized(a: AdvantageInput) -> Tensor:
    """GAE (1506.02438)."""
    o = a.options
    return gae(a.rewards_BT, a.values_BT, a.mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=a.bootstrap_B)


def n_step(a: AdvantageInput) -> Tensor:
    """The rewards of n tokens, then the critic's value, minus its value now (1602.01783)."""
    o = a.options
    return n_step_advantages(a.rewards_BT, a.values_BT, a.mask_BT, gamma=o.gamma, n=o.n_step, bootstrap_B=a.bootstrap_B)


def v_trace(a: AdvantageInput) -> tuple[Tensor, Tensor]:
    """V-trace (1802.01561): corrected, inside the estimator, for rollouts of older weights."""
    o = a.options
    return vtrace(
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


CRITIC_ADVANTAGES: dict[str, Advantage] = {"gae": generalized, "vtrace": v_trace, "n_step": n_step}
"""Those of `upslope ppo --advantage`."""

GROUP_ADVANTAGES: dict[str, Advantage] = {
    "grpo": lambda a: a.by_group(group_normalized),  # 2402.03300
    "dr_grpo": lambda a: a.by_group(group_centered),  # 2503.20783
    "rloo": lambda a: a.by_group(leave_one_out),  # 2402.14740
    "reinforce++": lambda a: a.by_group(lambda r_PG, mask_PG: whiten(group_centered(r_PG, mask_PG), mask_PG)),
}
"""Those of `upslope grpo --advantage`; the last one is 2501.03262."""


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
