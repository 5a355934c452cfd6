"""REINFORCE: the likelihood-ratio gradient with a baseline (Williams 1992), one gradient step per batch.

    for each step:
        sample G completions of each of P prompts from pi; judge them
        r_t = R [t = T-1] - kl_coef (log pi - log ref)(a_t | s_t);  step rewards at their own tokens
        G_t = r_t + gamma G_{t+1}
        A_t = G_t                                       none
              G_t - b,  b <- decay b + (1 - decay) R    moving, b of the steps before
              GAE(r, V; gamma, lam), lam = 1: G_t - V_t learned (actor-critic, arXiv 1602.01783)
              G_t - R(greedy reply to x)                greedy (SCST 1612.00563, ReMax 2310.10505)
              whiten(G_t) over the batch's tokens       reinforce++ (2501.03262)
        loss = mean_t [ -A_t log pi(a_t | s_t) ] (+ vf_coef (V_t - target_t)^2 / 2);  AdamW step

No ratio and no clip: the batch is used once. A baseline may depend on the prompt and on the past, not on the action.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.functional.masking import whiten
from upslope.functional.policy_losses import reinforce as likelihood_ratio
from upslope.functional.returns import discounted_returns, gae
from upslope.loop.rollout_queue import Sampled
from upslope.loop.session import begin, train
from upslope.options import ReinforceOptions
from upslope.recipes.actor_critic import ActorCritic
from upslope.rollout.collect import collect
from upslope.training.experience import Experience
from upslope.training.step import Outputs
from upslope.types import Batch, Reward, RolloutGroup, SamplingParams

__all__ = ["MovingBaseline", "Reinforce", "make_learner", "reinforce"]


def make_learner(options: ReinforceOptions, policy: Policy | None = None) -> closing[Reinforce]:
    """What a run trains, in a `with`; a `policy` already loaded is trained in place."""
    return closing(Reinforce(options, policy or load_policy(options)))


def reinforce(options: ReinforceOptions, *, policy: Policy | None = None) -> dict[str, Any]:
    """Train and return the summary; a `policy` already loaded is trained in place."""
    with begin(options) as begun, make_learner(options, policy) as learner:
        return train("reinforce", options, learner, begun)


class MovingBaseline:
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


class Reinforce(ActorCritic):
    """Return to go minus one of five baselines."""

    options: ReinforceOptions

    def __init__(self, options: ReinforceOptions, policy: Policy) -> None:
        super().__init__(options, policy, critic=options.critic if options.baseline == "learned" else None)
        self.moving = MovingBaseline(options.baseline_decay)

    def draw(self, index: int) -> Sampled:
        """A batch; with the greedy baseline also one judged greedy reply to each of its prompts."""
        sampled = super().draw(index)
        if self.options.baseline != "greedy":
            return sampled
        started = time.perf_counter()
        params = SamplingParams(max_tokens=self.options.max_completion_length, temperature=0.0)
        prompts = [group.prompt for group in sampled.groups]
        with torch.no_grad():
            sampled.greedy, judged = collect(self.engine, self.policy.tokenizer, self.judge, prompts, params)
        self.engine.sleep()
        _leave_out_unjudged(sampled.groups, sampled.greedy)
        sampled.metrics["reward/errors"] += judged["reward/errors"]
        sampled.metrics["seconds/rollout"] += time.perf_counter() - started
        return sampled

    @torch.no_grad()
    def estimate(self, experience: Experience, sampled: Sampled) -> dict[str, float]:
        """Fill in old_logp and the advantage of every token; with a critic also values and targets."""
        o, flat, mask_BT = self.options, experience.flat, experience.mask_BT
        scored, metrics = self.score(experience)
        rewards_BT, more = self.rewards(experience)
        bootstrap_B = self.bootstrap(experience, scored)
        metrics |= more
        if o.baseline == "learned":
            values_BT = experience.padded(flat["values"])
            advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=bootstrap_B)
            flat["targets"] = experience.unpadded(advantages_BT + values_BT)
            metrics |= self.explained(experience, rewards_BT, bootstrap_B)
        else:
            baseline_B, said = self.baseline(experience, rewards_BT, sampled.greedy)
            metrics |= said
            advantages_BT = discounted_returns(rewards_BT, mask_BT, gamma=o.gamma) - baseline_B[:, None]
        if o.baseline == "reinforce++" or o.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
        flat["advantages"] = experience.unpadded(advantages_BT)
        return metrics

    def baseline(
        self, experience: Experience, rewards_BT: Tensor, greedy: list[RolloutGroup]
    ) -> tuple[Tensor, dict[str, float]]:
        """What is subtracted from the returns of each sequence [B]; the moving mean then takes in this batch."""
        o = self.options
        if o.baseline == "moving":
            before = self.moving.value
            self.moving.update(float(rewards_BT.sum(1).mean()))
            return torch.full((experience.size,), before), {"baseline": before}
        if o.baseline == "greedy":
            replies = Experience.of(greedy)
            rewards_of, _ = self.shaped(replies)
            by_group = dict(zip(replies.group_B, rewards_of.tolist(), strict=True))
            baseline_B = torch.tensor([by_group[g] for g in experience.group_B])
            return baseline_B, {"baseline": float(baseline_B.mean())}
        return torch.zeros(experience.size), {}

    def optimize(self, experience: Experience, step: int) -> dict[str, float]:
        """One optimizer step on everything."""
        o = self.options
        constant = o.max_completion_length if o.normalizer == "constant" else None
        everything = list(range(experience.size))
        experience.set_weights(everything, o.normalizer, constant=constant)
        metrics = self.descend(experience, everything, step)
        self.updated()
        return {**metrics, "optimizer_steps": 1.0}

    def policy_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """-A log pi, corrected where the sampler's weights were others."""
        assert out.logp_N is not None
        policy_N = likelihood_ratio(out.logp_N, batch.fields["advantages"])
        if "importance" in batch.fields:
            policy_N = policy_N * batch.fields["importance"]
        return policy_N, {"loss/policy": policy_N}

    def state(self) -> dict[str, Any]:
        """Data position, weight version, KL controller, moving mean."""
        return {**super().state(), "moving": [self.moving.total, self.moving.weight]}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load(model, tensors, state)
        self.moving.total, self.moving.weight = state["moving"]


def _leave_out_unjudged(groups: list[RolloutGroup], greedy: list[RolloutGroup]) -> None:
    """Where the greedy reply has no reward there is no baseline: the prompt's completions are errors, too."""
    for group, reply in zip(groups, greedy, strict=True):
        reward = reply.rollouts[0].reward
        if reward.value is None:
            for rollout in group.rollouts:
                rollout.reward = Reward(value=None, error=f"the greedy reply could not be judged: {reward.error}")
