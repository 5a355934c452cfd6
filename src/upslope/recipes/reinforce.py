"""REINFORCE: the likelihood-ratio gradient with a baseline (Williams 1992), one gradient step per batch.

    for each step:
        sample G completions of each of P prompts from pi; judge them
        r_t = R [t = T-1] - kl_coef (log pi - log ref)(a_t | s_t);  step rewards at their own tokens
        G_t = r_t + gamma G_{t+1}
        A_t = G_t                                       none
              G_t - b                                   moving: b the decayed mean of R (KL in it) of earlier steps
              GAE(r, V; gamma, lam), lam = 1: G_t - V_t learned (actor-critic, arXiv 1602.01783)
              G_t - R(greedy reply to x)                greedy (SCST 1612.00563, ReMax 2310.10505)
              whiten(G_t) over the batch's tokens       reinforce++ (2501.03262)
        loss = mean_t [ -A_t log pi(a_t | s_t) ] (+ vf_coef (V_t - target_t)^2 / 2);  AdamW step

No ratio and no clip: the batch is used once. A baseline may depend on the prompt and on the past, not on the action.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy
from upslope.functional.kl import k1
from upslope.functional.masking import whiten
from upslope.functional.policy_losses import reinforce as likelihood_ratio
from upslope.functional.returns import discounted_returns, gae
from upslope.loop.companions import Critic, Reference
from upslope.loop.learner import RolloutLearner, rollout_metrics
from upslope.loop.objective import with_value_and_entropy
from upslope.loop.sampler import Sampled
from upslope.loop.session import Recipe
from upslope.loop.updater import score_before_update
from upslope.options import ReinforceOptions
from upslope.training.checkpoint import Part
from upslope.training.experience import Experience, shaped_rewards, token_rewards
from upslope.training.step import Forward, Outputs
from upslope.training.stopping import StepResult
from upslope.types import Batch


class MovingBaseline(Part):
    """An exponential moving mean without the pull of its start value: before the first batch it is 0."""

    def __init__(self, decay: float) -> None:
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    @property
    def value(self) -> float:
        """The mean of what was seen so far."""
        return self.total / self.weight if self.weight else 0.0

    def update(self, mean: float) -> None:
        """Take in one batch's mean."""
        self.total = self.decay * self.total + (1 - self.decay) * mean
        self.weight = self.decay * self.weight + (1 - self.decay)

    def state(self) -> dict[str, Any]:
        """The sum and its weight."""
        return {"moving": [self.total, self.weight]}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.total, self.weight = state["moving"]


class Reinforce(RolloutLearner):
    """Return to go minus one of five baselines."""

    options: ReinforceOptions

    def __init__(self, options: ReinforceOptions, policy: Policy) -> None:
        o = options
        self.critic = Critic(o, policy, o.critic if o.baseline == "learned" else None)
        self.reference = Reference(o, policy, o.kl_coef, o.kl_target, o.kl_horizon)
        self.moving = MovingBaseline(o.baseline_decay)
        parts = [self.critic, self.reference, self.moving]
        super().__init__(o, policy, extra=self.critic.extra, parts=parts, greedy=o.baseline == "greedy")

    def step(self, step: int) -> StepResult:
        """Sample, judge, score, subtract the baseline, one update on everything."""
        o, sampler, critic, reference = self.options, self.sampler, self.critic, self.reference
        sampled, started = sampler.next(step), time.perf_counter()
        x = Experience.of(sampled.groups, drop_truncated=sampler.drop_truncated)
        metrics = sampled.metrics | rollout_metrics(sampled.groups, x)

        with torch.no_grad():
            metrics |= score_before_update(o, x, sampler, critic)
            scores_B, penalties = shaped_rewards(x, o)
            rewards_BT = token_rewards(x, scores_B)
            if o.kl_coef:
                metrics |= reference.score(x, o.temperature)
                metrics["objective/kl_coef"] = reference.coef
                rewards_BT = rewards_BT - reference.coef * x.padded(k1(x.old_logprobs, x.ref_logprobs))
            if o.baseline == "learned":
                values_BT, mask_BT = x.padded(x.values), x.mask_BT
                advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=x.bootstrap_B)
                x.returns = x.unpadded(advantages_BT + values_BT)
                metrics |= critic.explained(x, rewards_BT)
            else:
                baseline_B, said = self.baseline(x, rewards_BT, sampled)
                advantages_BT = discounted_returns(rewards_BT, x.mask_BT, gamma=o.gamma) - baseline_B[:, None]
                metrics |= said
            if o.baseline == "reinforce++" or o.whiten_advantages:
                advantages_BT = whiten(advantages_BT, x.mask_BT)
            x.advantages = x.unpadded(advantages_BT)

        everything = list(range(x.size))
        x.set_weights(everything, o.normalizer, constant=o.max_completion_length)
        metrics |= penalties | critic.update(x, everything, self.updater.learning_rate(step))
        forward = Forward(o.temperature, entropy=o.entropy_coef > 0, head=critic.head, detach_trunk=o.vf_coef == 0)
        metrics |= self.updater.update_on(x, everything, step, self.loss, forward, sampler=sampler, first=True)
        return self.finish(step, sampled.groups, x, {**metrics, "optimizer_steps": 1.0}, started)

    def baseline(self, x: Experience, rewards_BT: Tensor, sampled: Sampled) -> tuple[Tensor, dict[str, float]]:
        """What is subtracted from the returns of each sequence [B]; the moving mean then takes in this batch."""
        o = self.options
        if o.baseline == "moving":
            before = self.moving.value
            self.moving.update(float(rewards_BT.sum(1).mean()))
            return torch.full((x.size,), before), {"baseline": before}
        if o.baseline == "greedy":
            replies = Experience.of(sampled.greedy)
            rewards_of, _ = shaped_rewards(replies, o)
            by_group = dict(zip(replies.group_B, rewards_of.tolist(), strict=True))
            baseline_B = torch.tensor([by_group[g] for g in x.group_B])
            return baseline_B, {"baseline": float(baseline_B.mean())}
        return torch.zeros(x.size), {}

    def loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """-A log pi, corrected where the sampler's policy was another, and what shares its backward pass."""
        o, f = self.options, batch.fields
        policy_N = likelihood_ratio(out.logp_N, f["advantages"])
        if "importance" in f:
            policy_N = policy_N * f["importance"]
        loss_N, metrics = policy_N, {"loss/policy": policy_N}
        return with_value_and_entropy(o, loss_N, metrics, batch, out, self.critic)


reinforce = Recipe("reinforce", Reinforce.of)
