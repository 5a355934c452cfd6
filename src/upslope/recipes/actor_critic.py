"""What REINFORCE and PPO share: rewards along the tokens with their KL, the critic and its optimizer, one update.

The algorithms themselves are in reinforce.py and ppo.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Critic, Policy, load_critic, load_reference, take_masters
from upslope.errors import ConfigError
from upslope.functional.kl import AdaptiveKL, k1
from upslope.functional.metrics import explained_variance
from upslope.functional.returns import discounted_returns
from upslope.functional.supervised_losses import value_loss
from upslope.options import PPOOptions, ReinforceOptions
from upslope.recipes.policy_gradient import PolicyGradient
from upslope.training.experience import Experience, token_rewards
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Outputs, score, update
from upslope.types import Batch

__all__ = ["ActorCritic"]


class ActorCritic(PolicyGradient):
    """A policy, a critic or none, and the KL to a reference model as part of the reward."""

    options: PPOOptions | ReinforceOptions

    def __init__(self, options: PPOOptions | ReinforceOptions, policy: Policy, *, critic: str | None) -> None:
        self.critic = load_critic(policy, critic, options) if critic is not None else None
        factor = _critic_factor(options)
        shared = self.critic is not None and self.critic.model is None
        head = Group(self.critic.named_parameters(), lr_factor=factor) if self.critic and shared else None
        super().__init__(options, policy, extra=[head] if head else [])
        apart = self.critic is not None and not shared
        self.critic_optimizer = _critic_optimizer(self.critic, options, factor) if self.critic and apart else None
        self.reference = load_reference(policy, options) if options.kl_coef else None
        self.kl = AdaptiveKL(options.kl_coef, options.kl_target, options.kl_horizon) if options.kl_target else None
        self.kl_coef = options.kl_coef
        """The weight of the KL to the reference in this step."""

    def score(self, experience: Experience) -> tuple[Outputs, dict[str, float]]:
        """Fill in old_logp and values before the update, and the correction where the sampler's weights were others.

        One pass where the critic shares the trunk, none for log-probs that are known (`on_policy`).
        """
        o, model, critic = self.options, self.policy.model, self.critic
        shared = critic.head if critic is not None and critic.model is None else None
        cut = o.truncated == "bootstrap"
        batches, order = experience.batches(
            range(experience.size), o.micro_batch_tokens, feed_last=cut, device=model.device
        )
        self.replay(batches)
        out, logp = Outputs(), not self.on_policy
        if logp or shared is not None:
            out = score(model, batches, temperature=o.temperature, logp=logp, head=shared)
        if critic is not None and critic.model is not None:
            valued = score(critic.model, batches, logp=False, head=critic.head)
            out = Outputs(out.logp_N, None, valued.values_N, valued.final_B)
        scored = experience.in_order(out, order)
        if scored.values_N is not None:
            experience.flat["values"] = scored.values_N
        return scored, self.old_logp(experience, scored_N=scored.logp_N)

    def rewards(self, experience: Experience, *, kl_in_reward: bool = True) -> tuple[Tensor, dict[str, float]]:
        """Rewards along the tokens [B, T]: process rewards, the score at the end, minus the KL to the reference."""
        o, flat = self.options, experience.flat
        scores_B, metrics = self.shaped(experience)
        rewards_BT = token_rewards(experience, scores_B)
        if not o.kl_coef:
            return rewards_BT, metrics
        flat["ref_logp"] = self.reference_logp(experience, self.reference)
        divergence_N = k1(flat["old_logp"], flat["ref_logp"])
        kl = float(experience.sequence_sums(divergence_N).mean())
        if self.kl:
            self.kl_coef = self.kl.coef
            self.kl.update(kl, experience.size)
        metrics |= {"objective/kl": kl, "objective/kl_coef": self.kl_coef}
        if kl_in_reward:
            rewards_BT = rewards_BT - self.kl_coef * experience.padded(divergence_N)
        return rewards_BT, metrics

    def bootstrap(self, experience: Experience, scored: Outputs) -> Tensor | None:
        """V of the state after a completion that was cut by its budget [B]; None where every end is an end."""
        if self.options.truncated != "bootstrap":
            return None
        assert scored.final_B is not None
        cut_B = torch.tensor([r.finish_reason == "length" for r in experience.rollouts])
        return torch.where(cut_B, scored.final_B, 0.0)

    def explained(self, experience: Experience, rewards_BT: Tensor, bootstrap_B: Tensor | None) -> dict[str, float]:
        """How much of the returns' variance the critic explains."""
        mask_BT = experience.mask_BT
        returns_BT = discounted_returns(rewards_BT, mask_BT, gamma=self.options.gamma, bootstrap_B=bootstrap_B)
        values_BT = experience.padded(experience.flat["values"])
        return {"val/explained_variance": float(explained_variance(values_BT, returns_BT, mask_BT))}

    def descend(
        self, experience: Experience, members: list[int], step: int, *, first: bool = True, frozen: bool = False
    ) -> dict[str, float]:
        """One optimizer step of the policy, and of a critic that stands apart; `frozen` moves the critic only.

        `first`: the policy's weights are still those that sampled. The members' weights in the loss
        (`Experience.set_weights`) are set by the caller.
        """
        o, model, critic = self.options, self.policy.model, self.critic
        batches, _ = experience.batches(members, o.micro_batch_tokens, device=model.device)
        metrics: dict[str, float] = {}
        if critic is not None and critic.model is not None and self.critic_optimizer is not None:
            critic.model.train()
            done = update(
                critic.model,
                self.critic_optimizer,
                batches,
                self.value_loss,
                learning_rate=self.learning_rate(step),
                max_grad_norm=o.max_grad_norm,
                head=critic.head,
                logp=False,
            )
            metrics |= {"loss/value": done["loss/value"], "critic_grad_norm": done["grad_norm"]}
        taken = self.take_over(experience, members, batches, step) if first else {}
        metrics |= taken
        shared = critic.head if critic is not None and critic.model is None else None
        if frozen:
            if shared is not None:
                metrics |= self.update(step, batches, self.value_loss, head=shared, logp=False, detach_trunk=True)
            return metrics
        return metrics | self.update(
            step,
            batches,
            self.loss,
            temperature=o.temperature,
            entropy=o.entropy_coef > 0,
            head=shared,
            detach_trunk=o.vf_coef == 0,
            gap_to="rollout_logp" if self.on_policy and first and not taken else None,
        )

    def value_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Half the squared error against the targets."""
        assert out.values_N is not None
        loss_N = value_loss(out.values_N, batch.fields["targets"])
        return loss_N, {"loss/value": loss_N}

    def policy_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The algorithm's own loss per token, and its metrics."""
        raise NotImplementedError(f"{type(self).__name__} gives no policy loss")

    def loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Policy loss, corrected for the sampler, and what shares its backward pass: value and entropy."""
        o = self.options
        loss_N, metrics = self.policy_loss(batch, out)
        if out.values_N is not None:
            value_N, value_metrics = self.value_loss(batch, out)
            # With vf_coef = 0 the trunk is detached: the head alone learns, at full weight.
            loss_N = loss_N + (o.vf_coef or 1.0) * value_N
            metrics |= value_metrics
        if out.entropy_N is not None:
            loss_N = loss_N - o.entropy_coef * out.entropy_N
            metrics["policy/entropy"] = out.entropy_N
        return loss_N, metrics

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Optimizer, and the critic's weights (and its optimizer's moments where it stands apart)."""
        if self.critic is None:
            return super().tensors()
        if self.critic_optimizer is None:
            weights = self.optimizer.weights()
            return {**super().tensors(), "critic": {name: weights[name] for name in self.critic.named_parameters()}}
        return {
            **super().tensors(),
            "critic": self.critic_optimizer.weights(),
            "critic_optimizer": self.critic_optimizer.state(),
        }

    def state(self) -> dict[str, Any]:
        """Data position, weight version, KL controller."""
        return {**super().state(), "kl": self.kl.state_dict() if self.kl else None}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load(model, tensors, state)
        if self.critic_optimizer is not None:
            self.critic_optimizer.load(tensors["critic"], tensors["critic_optimizer"])
        if self.kl and state["kl"]:
            self.kl.load_state_dict(state["kl"])


def _critic_factor(options: PPOOptions | ReinforceOptions) -> float:
    """The critic's learning rate as a multiple of the policy's."""
    if options.critic_learning_rate is None:
        return 10.0
    if options.learning_rate == 0:
        raise ConfigError("critic_learning_rate is relative to the schedule of learning_rate, which must not be 0")
    return options.critic_learning_rate / options.learning_rate


def _critic_optimizer(critic: Critic, options: PPOOptions | ReinforceOptions, factor: float) -> MasterAdamW:
    groups = decay_groups(critic.named_parameters().items(), weight_decay=options.weight_decay, lr_factor=factor)
    return MasterAdamW(groups, masters=take_masters(critic))
