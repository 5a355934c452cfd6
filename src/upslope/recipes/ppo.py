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

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from upslope import plugins
from upslope.build import Policy
from upslope.functional.kl import importance_k1, k1, rollout_kl
from upslope.functional.masking import whiten
from upslope.loop.companions import Critic, Reference
from upslope.loop.learner import RolloutLearner, means_of, rollout_metrics
from upslope.loop.objective import AdvantageInput, corrected, estimate, with_value_and_entropy
from upslope.loop.session import Recipe
from upslope.loop.updater import score_before_update
from upslope.options import PPOOptions
from upslope.options.policy import CRITIC_ADVANTAGES, PPO_LOSSES
from upslope.training.experience import Experience, shaped_rewards, token_rewards
from upslope.training.step import Forward, Outputs
from upslope.training.stopping import StepResult
from upslope.types import Batch


class PPO(RolloutLearner):
    """Clipped policy and value losses over several passes, advantages from a critic, KL to a reference."""

    options: PPOOptions

    def __init__(self, options: PPOOptions, policy: Policy) -> None:
        o = options
        self.advantage = plugins.load(o.advantage, CRITIC_ADVANTAGES, kind="advantage", takes=("a",)).function
        self.policy_loss = plugins.load(o.loss, PPO_LOSSES, kind="loss", takes=("x",)).function
        self.critic = Critic(o, policy, o.critic)
        self.reference = Reference(o, policy, o.kl_coef, o.kl_target, o.kl_horizon)
        super().__init__(o, policy, extra=self.critic.extra, parts=[self.critic, self.reference])

    def step(self, step: int) -> StepResult:
        """Sample, judge, score, estimate, update."""
        o, sampler, critic, reference = self.options, self.sampler, self.critic, self.reference
        sampled, started = sampler.next(step), time.perf_counter()
        x = Experience.of(sampled.groups, drop_truncated=sampler.drop_truncated)
        metrics = sampled.metrics | rollout_metrics(sampled.groups, x)

        with torch.no_grad():
            # V-trace carries the importance weights in its advantages.
            metrics |= score_before_update(o, x, sampler, critic, correct=o.advantage != "vtrace")
            scores_B, penalties = shaped_rewards(x, o)
            rewards_BT = token_rewards(x, scores_B)
            if o.kl_coef:
                metrics |= reference.score(x, o.temperature)
                metrics["objective/kl_coef"] = reference.coef
                if o.kl_placement == "reward":
                    rewards_BT = rewards_BT - reference.coef * x.padded(k1(x.old_logprobs, x.ref_logprobs))
            metrics |= penalties | critic.explained(x, rewards_BT)
            judged = AdvantageInput(o, x, scores_B, rewards_BT, len(sampled.groups))
            advantages_BT = estimate(self.advantage, judged)
            if o.whiten_advantages:
                advantages_BT = whiten(advantages_BT, x.mask_BT)
            x.advantages = x.unpadded(advantages_BT)

        made: list[dict[str, float]] = []
        for epoch in range(step * o.num_epochs, (step + 1) * o.num_epochs):
            for members in x.minibatches(o.num_minibatches, seed=o.seed, epoch=epoch):
                x.set_weights(members, "token")
                made.append(self.descend(x, members, step, first=not made))
            if o.target_kl and made[-1].get("policy/approx_kl", 0.0) > 1.5 * o.target_kl:
                break
        return self.finish(step, sampled.groups, x, metrics | means_of(made), started)

    def descend(self, x: Experience, members: list[int], step: int, *, first: bool) -> dict[str, float]:
        """One optimizer step of the critic and, once value_pretraining_steps are over, of the policy."""
        o, head = self.options, self.critic.head
        metrics = self.critic.update(x, members, self.updater.learning_rate(step))
        loss = self.loss
        forward = Forward(o.temperature, entropy=o.entropy_coef > 0, head=head, detach_trunk=o.vf_coef == 0)
        if step < o.value_pretraining_steps:
            loss, forward = self.critic.loss, Forward(logp=False, head=head, detach_trunk=True)
        return metrics | self.updater.update_on(x, members, step, loss, forward, sampler=self.sampler, first=first)

    def loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The policy loss of the options, and what shares its backward pass: penalties, value and entropy."""
        o, f = self.options, batch.fields
        loss_N, metrics = corrected(self.policy_loss, o, batch, out)
        if o.kl_coef and o.kl_placement == "loss":
            loss_N = loss_N + self.reference.coef * importance_k1(out.logp_N, f["ref_logprobs"], f["old_logprobs"])
        if o.rollout_kl_coef:
            loss_N = loss_N + o.rollout_kl_coef * rollout_kl(out.logp_N, f["old_logprobs"])
        return with_value_and_entropy(o, loss_N, metrics, batch, out, self.critic)


ppo = Recipe("ppo", PPO.of)
