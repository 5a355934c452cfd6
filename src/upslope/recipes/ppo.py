"""Proximal policy optimization with a critic, token by token (arXiv 1707.06347; for language models 1909.08593).

    for each step:
        sample G completions of each of P prompts from pi; judge them
        old_t = log pi(a_t | s_t),  V_t = V(s_t)                       one scoring pass
        r_t   = R [t = T-1] - kl_coef (old_t - log ref(a_t | s_t))     kl_placement = reward
        A     = GAE(r, V; gamma, lam);  target = A + V;  A <- whiten(A)
        for each epoch, each minibatch:
            rho  = exp(log pi(a_t | s_t) - old_t)
            loss = mean_t [ -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) + vf_coef (V - target)^2 / 2 ]
            AdamW step

Where a task rewards single steps, r_t holds them at their tokens. Advantage actor-critic (A2C) is this with one epoch
and one minibatch (arXiv 2205.09123). With rollouts of older weights mu, old is still the trainer's log-prob before
the update; A is corrected by weights w = pi_old / mu on the loss, or estimated by V-trace (1802.01561), which has them
inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.functional.kl import importance_k1, rollout_kl
from upslope.functional.masking import whiten
from upslope.functional.policy_losses import clipped_surrogate
from upslope.functional.returns import gae, vtrace
from upslope.functional.supervised_losses import value_loss
from upslope.loop.rollout_queue import Sampled
from upslope.loop.session import begin, train
from upslope.options import PPOOptions
from upslope.recipes.actor_critic import ActorCritic
from upslope.recipes.policy_gradient import means_of, ratio_metrics
from upslope.training.experience import Experience
from upslope.training.step import Outputs
from upslope.types import Batch

__all__ = ["PPO", "make_learner", "ppo"]


def make_learner(options: PPOOptions, policy: Policy | None = None) -> closing[PPO]:
    """What a run trains, in a `with`; a `policy` already loaded is trained in place."""
    return closing(PPO(options, policy or load_policy(options)))


def ppo(options: PPOOptions, *, policy: Policy | None = None) -> dict[str, Any]:
    """Train and return the summary; a `policy` already loaded is trained in place."""
    with begin(options) as begun, make_learner(options, policy) as learner:
        return train("ppo", options, learner, begun)


class PPO(ActorCritic):
    """Clipped policy and value losses over several passes, GAE or V-trace, KL to a reference."""

    options: PPOOptions

    def __init__(self, options: PPOOptions, policy: Policy) -> None:
        super().__init__(options, policy, critic=options.critic)

    @torch.no_grad()
    def estimate(self, experience: Experience, sampled: Sampled) -> dict[str, float]:
        """Fill in old_logp, values, advantages and targets of every token."""
        o, flat = self.options, experience.flat
        scored, metrics = self.score(experience)
        rewards_BT, more = self.rewards(experience, kl_in_reward=o.kl_placement == "reward")
        bootstrap_B = self.bootstrap(experience, scored)
        metrics |= more | self.explained(experience, rewards_BT, bootstrap_B)
        advantages_BT, targets_BT = self._advantages(experience, rewards_BT, bootstrap_B)
        flat["targets"] = experience.unpadded(targets_BT)
        if o.whiten_advantages:
            advantages_BT = whiten(advantages_BT, experience.mask_BT)
        flat["advantages"] = experience.unpadded(advantages_BT)
        return metrics

    def _advantages(
        self, experience: Experience, rewards_BT: Tensor, bootstrap_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Advantages and value targets [B, T]."""
        o, flat, mask_BT = self.options, experience.flat, experience.mask_BT
        values_BT = experience.padded(flat["values"])
        if o.advantage == "vtrace":
            log_ratio_BT = experience.padded(flat["old_logp"] - flat["sampling_logp"])
            return vtrace(
                log_ratio_BT,
                rewards_BT,
                values_BT,
                mask_BT,
                gamma=o.gamma,
                lam=o.lam,
                rho_clip=o.rho_clip,
                c_clip=o.c_clip,
                bootstrap_B=bootstrap_B,
            )
        advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=bootstrap_B)
        return advantages_BT, advantages_BT + values_BT

    def correction(self, experience: Experience, trainer_logp_N: Tensor, *, exact: bool) -> Tensor | None:
        """As every recipe's; none with V-trace, whose advantages carry the weights already."""
        if self.options.advantage == "vtrace":
            return None
        return super().correction(experience, trainer_logp_N, exact=exact)

    def optimize(self, experience: Experience, step: int) -> dict[str, float]:
        """The passes over the step's rollouts; metrics are means over the optimizer steps that were made."""
        o = self.options
        frozen = step < o.value_pretraining_steps
        made: list[dict[str, float]] = []
        for epoch in range(o.num_epochs):
            place = step * o.num_epochs + epoch
            for members in experience.minibatches(o.num_minibatches, seed=o.seed, epoch=place):
                experience.set_weights(members, "token")
                made.append(self.descend(experience, members, step, first=not made, frozen=frozen))
            if o.target_kl and not frozen and made[-1]["policy/approx_kl"] > 1.5 * o.target_kl:
                break
        self.updated()
        return means_of(made)

    def value_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Half the squared error, optionally clipped around the rollout's value."""
        assert out.values_N is not None
        clip, f = self.options.value_clip, batch.fields
        old = f["values"] if clip is not None else None
        loss_N = value_loss(out.values_N, f["targets"], old_values=old, clip=clip)
        return loss_N, {"loss/value": loss_N}

    def policy_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate and the penalties with a gradient of their own."""
        o, f = self.options, batch.fields
        assert out.logp_N is not None
        high = o.epsilon if o.epsilon_high is None else o.epsilon_high
        policy_N = clipped_surrogate(
            out.logp_N, f["old_logp"], f["advantages"], clip_low=o.epsilon, clip_high=high, dual_clip=o.dual_clip
        )
        if "importance" in f:
            policy_N = policy_N * f["importance"]
        loss_N = policy_N
        if o.kl_coef and o.kl_placement == "loss":
            loss_N = loss_N + self.kl_coef * importance_k1(out.logp_N, f["ref_logp"], f["old_logp"])
        if o.rollout_kl_coef:
            loss_N = loss_N + o.rollout_kl_coef * rollout_kl(out.logp_N, f["old_logp"])
        return loss_N, {"loss/policy": policy_N, **ratio_metrics(out.logp_N, f, o.epsilon, high)}
