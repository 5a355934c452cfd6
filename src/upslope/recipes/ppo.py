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

Advantage actor-critic (A2C) is this with one epoch and one minibatch (arXiv 2205.09123).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Critic, Policy, load_critic, load_policy, load_reference
from upslope.errors import ConfigError
from upslope.functional.kl import AdaptiveKL, importance_k1, k1, rollout_kl
from upslope.functional.masking import whiten
from upslope.functional.metrics import explained_variance
from upslope.functional.policy_losses import clipped_surrogate
from upslope.functional.returns import discounted_returns, gae
from upslope.functional.shaping import at_last_token
from upslope.functional.supervised_losses import value_loss
from upslope.options import PPOOptions
from upslope.recipes.dry_run import show_policy_gradient
from upslope.recipes.policy_gradient import PolicyGradient, ratio_metrics, rollout_metrics
from upslope.recipes.session import StepResult, exit_code, train
from upslope.training.experience import Experience, logprob_gap, shaped_rewards
from upslope.training.optim import Group, MasterAdamW, decay_groups
from upslope.training.step import Outputs, score, update
from upslope.types import Batch

__all__ = ["PPO", "ppo", "run"]


def run(options: PPOOptions) -> int:
    """The verb `upslope ppo`."""
    if options.dry_run:
        return show_policy_gradient("ppo", options)
    summary = ppo(options)
    if options.json:
        print(json.dumps(summary))
    return exit_code(summary)


def ppo(options: PPOOptions, *, policy: Policy | None = None) -> dict[str, Any]:
    """Train and return the summary; a `policy` already loaded is trained in place."""
    learner = PPO(options, policy or load_policy(options))
    try:
        return train("ppo", options, learner)
    finally:
        learner.close()


class PPO(PolicyGradient):
    """Clipped policy and value losses over several passes, GAE, KL to a reference."""

    options: PPOOptions

    def __init__(self, options: PPOOptions, policy: Policy) -> None:
        self.critic = load_critic(policy, options.critic, options)
        factor = _critic_factor(options)
        shared = self.critic.model is None
        head = Group(self.critic.named_parameters(), lr_factor=factor) if shared else None
        super().__init__(options, policy, extra=[head] if head else [])
        self.critic_optimizer = None if shared else _critic_optimizer(self.critic, options, factor)
        self.reference = load_reference(policy, options) if options.kl_coef else None
        self.kl = AdaptiveKL(options.kl_coef, options.kl_target, options.kl_horizon) if options.kl_target else None

    @property
    def kl_coef(self) -> float:
        """The present weight of the KL to the reference."""
        return self.kl.coef if self.kl else self.options.kl_coef

    def step(self, step: int) -> StepResult:
        """Sample, judge, estimate advantages, update."""
        groups, metrics = self.sample(step)
        started = time.perf_counter()
        experience = Experience.of(groups, drop_truncated=self.options.truncated == "mask")
        metrics |= rollout_metrics(groups, experience)
        metrics |= self.estimate(experience)
        metrics |= self.optimize(experience, step)
        metrics["seconds/update"] = time.perf_counter() - started
        tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in experience.rollouts)
        metrics["tokens_per_second"] = tokens / (metrics["seconds/update"] + metrics["seconds/rollout"])
        self.record(step, groups, experience, ("old_logp", "ref_logp", "values", "advantages", "targets"))
        return StepResult(metrics, experience.num_trained)

    @torch.no_grad()
    def estimate(self, experience: Experience) -> dict[str, float]:
        """Fill in old_logp, values, advantages and targets of every token."""
        o, flat = self.options, experience.flat
        scored = self._score(experience)
        assert scored.logp_N is not None
        assert scored.values_N is not None
        assert scored.final_B is not None
        metrics = logprob_gap(experience, scored.logp_N)
        flat["old_logp"], flat["values"] = scored.logp_N, scored.values_N
        weights = self.correction(experience, scored.logp_N, exact=metrics["rollout/max_logprob_diff"] == 0)
        if weights is not None:
            flat["importance"] = weights

        scores_B, shaping = shaped_rewards(
            experience,
            missing_eos_penalty=o.missing_eos_penalty,
            overlong_buffer=o.overlong_buffer,
            max_completion_length=o.max_completion_length,
        )
        mask_BT = experience.mask_BT
        rewards_BT = at_last_token(scores_B, mask_BT)
        if o.kl_coef:
            flat["ref_logp"] = self.reference_logp(experience, self.reference)
            divergence_N = k1(flat["old_logp"], flat["ref_logp"])
            kl = float(experience.sequence_sums(divergence_N).mean())
            metrics |= {"objective/kl": kl, "objective/kl_coef": self.kl_coef}
            if o.kl_placement == "reward":
                rewards_BT = rewards_BT - self.kl_coef * experience.padded(divergence_N)
            if self.kl:
                self.kl.update(kl, experience.size)

        cut_B = torch.tensor([r.finish_reason == "length" for r in experience.rollouts])
        bootstrap_B = torch.where(cut_B, scored.final_B, 0.0) if o.truncated == "bootstrap" else None
        values_BT = experience.padded(flat["values"])
        advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=o.gamma, lam=o.lam, bootstrap_B=bootstrap_B)
        returns_BT = discounted_returns(rewards_BT, mask_BT, gamma=o.gamma, bootstrap_B=bootstrap_B)
        flat["targets"] = experience.unpadded(advantages_BT + values_BT)
        if o.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT)
        flat["advantages"] = experience.unpadded(advantages_BT)
        metrics |= shaping
        metrics["val/explained_variance"] = float(explained_variance(values_BT, returns_BT, mask_BT))
        metrics["objective/entropy"] = float(-flat["old_logp"].mean())
        return metrics

    def _score(self, experience: Experience) -> Outputs:
        """Log-probs and values before the update: one pass where the critic shares the trunk, else two."""
        o, model = self.options, self.policy.model
        batches, order = experience.batches(range(experience.size), o.micro_batch_tokens, device=model.device)
        if self.critic.model is None:
            return experience.in_order(score(model, batches, temperature=o.temperature, head=self.critic.head), order)
        scored = score(model, batches, temperature=o.temperature)
        valued = score(self.critic.model, batches, logp=False, head=self.critic.head)
        return experience.in_order(Outputs(scored.logp_N, None, valued.values_N, valued.final_B), order)

    def optimize(self, experience: Experience, step: int) -> dict[str, float]:
        """The passes over the step's rollouts; metrics are means over the optimizer steps that were made."""
        o = self.options
        frozen = step < o.value_pretraining_steps
        made: list[dict[str, float]] = []
        for epoch in range(o.num_epochs):
            place = step * o.num_epochs + epoch
            for members in experience.minibatches(o.num_minibatches, seed=o.seed, epoch=place):
                made.append(self._update(experience, members, step, frozen=frozen))
            if o.target_kl and not frozen and made[-1]["policy/approx_kl"] > 1.5 * o.target_kl:
                break
        self.updated()
        metrics = {name: sum(m[name] for m in made) / len(made) for name in made[0]}
        return {**metrics, "optimizer_steps": float(len(made))}

    def _update(self, experience: Experience, members: list[int], step: int, *, frozen: bool) -> dict[str, float]:
        o, model, head = self.options, self.policy.model, self.critic.head
        experience.set_weights(members, "token")
        batches, _ = experience.batches(members, o.micro_batch_tokens, device=model.device)
        rates: dict[str, Any] = {"learning_rate": self.learning_rate(step), "max_grad_norm": o.max_grad_norm}
        metrics: dict[str, float] = {}
        if self.critic_optimizer is not None and self.critic.model is not None:
            self.critic.model.train()
            done = update(
                self.critic.model, self.critic_optimizer, batches, self._value_loss, **rates, head=head, logp=False
            )
            metrics |= {"loss/value": done["loss/value"], "critic_grad_norm": done["grad_norm"]}
        model.train()
        if frozen:
            if self.critic_optimizer is None:
                metrics |= update(
                    model, self.optimizer, batches, self._value_loss, **rates, head=head, logp=False, detach_trunk=True
                )
            return metrics
        shared = head if self.critic_optimizer is None else None
        metrics |= update(
            model,
            self.optimizer,
            batches,
            self._loss,
            **rates,
            temperature=o.temperature,
            entropy=o.entropy_coef > 0,
            head=shared,
            detach_trunk=o.vf_coef == 0,
        )
        return metrics

    def _value_loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert out.values_N is not None
        f = batch.fields
        clip = self.options.value_clip
        old = f["values"] if clip is not None else None
        loss_N = value_loss(out.values_N, f["targets"], old_values=old, clip=clip)
        return loss_N, {"loss/value": loss_N}

    def _loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Policy loss, and what shares its backward pass: value, KL, entropy."""
        o, f = self.options, batch.fields
        assert out.logp_N is not None
        high = o.epsilon if o.epsilon_high is None else o.epsilon_high
        policy_N = clipped_surrogate(
            out.logp_N, f["old_logp"], f["advantages"], clip_low=o.epsilon, clip_high=high, dual_clip=o.dual_clip
        )
        if "importance" in f:
            policy_N = policy_N * f["importance"]
        loss_N = policy_N
        metrics = {"loss/policy": policy_N, **ratio_metrics(out.logp_N, f, o.epsilon, high)}
        if out.values_N is not None:
            value_N, value_metrics = self._value_loss(batch, out)
            loss_N = loss_N + (o.vf_coef or 1.0) * value_N
            metrics |= value_metrics
        if o.kl_coef and o.kl_placement == "loss":
            loss_N = loss_N + self.kl_coef * importance_k1(out.logp_N, f["ref_logp"], f["old_logp"])
        if o.rollout_kl_coef:
            loss_N = loss_N + o.rollout_kl_coef * rollout_kl(out.logp_N, f["old_logp"])
        if out.entropy_N is not None:
            loss_N = loss_N - o.entropy_coef * out.entropy_N
            metrics["policy/entropy"] = out.entropy_N
        return loss_N, metrics

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Optimizer, and the critic's weights (and its optimizer's moments where it stands apart)."""
        own = self.critic.named_parameters()
        if self.critic_optimizer is None:
            weights = self.optimizer.weights()
            return {**super().tensors(), "critic": {name: weights[name] for name in own}}
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


def _critic_factor(options: PPOOptions) -> float:
    """The critic's learning rate as a multiple of the policy's."""
    if options.critic_learning_rate is None:
        return 10.0
    if options.learning_rate == 0:
        raise ConfigError("critic_learning_rate is relative to the schedule of learning_rate, which must not be 0")
    return options.critic_learning_rate / options.learning_rate


def _critic_optimizer(critic: Critic, options: PPOOptions, factor: float) -> MasterAdamW:
    groups = decay_groups(critic.named_parameters().items(), weight_decay=options.weight_decay, lr_factor=factor)
    optimizer = MasterAdamW(groups, masters=critic.masters)
    critic.masters = {}
    return optimizer
