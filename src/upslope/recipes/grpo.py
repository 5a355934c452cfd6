"""Policy gradient without a critic: the other completions of a prompt are the baseline (GRPO, arXiv 2402.03300).

    for each step:
        sample G completions of each of P prompts from pi; judge them
        A_i  = (R_i - mean) / (std + 1e-4)    grpo          R_i - mean            dr_grpo (2503.20783)
               R_i - mean of the others       rloo (2402.14740)
               centred, then whitened over the batch        reinforce++ baseline (2501.03262)
        for each iteration, each minibatch:
            rho  = exp(log pi(a_t | s_t) - old_t)
            loss = -min(rho A, clip(rho) A)                                clipped; DAPO's clip-higher by epsilon_high
                   per sequence, rho the geometric mean                    gspo (2507.18071)
                   -sg(clip(rho)) A log pi                                 cispo (2506.13585)
                   -(4 / tau) sigmoid(tau (rho - 1)) A                     sapo (2511.20347)
                   + beta KL(pi || ref)
            normalised over tokens (DAPO, 2503.14476), sequences or a constant; AdamW step

The whole sequence carries one advantage; a group whose rewards are all equal has advantage 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, load_policy, load_reference
from upslope.data.batching import padded_from_flat
from upslope.errors import DataError
from upslope.functional.advantages import group_centered, group_normalized, leave_one_out
from upslope.functional.kl import importance_k1, k1
from upslope.functional.masking import whiten
from upslope.functional.policy_losses import (
    clipped_is_reinforce,
    clipped_surrogate,
    sequence_clipped_surrogate,
    soft_gated,
)
from upslope.loop.rollout_queue import Sampled
from upslope.loop.session import begin, train
from upslope.options import GRPOOptions
from upslope.recipes.policy_gradient import PolicyGradient, means_of, ratio_metrics
from upslope.training.experience import Experience, Normalizer, group_rewards, trainable
from upslope.training.step import Outputs, score
from upslope.types import Batch, RolloutGroup

__all__ = ["GRPO", "grpo", "make_learner"]


def make_learner(options: GRPOOptions, policy: Policy | None = None) -> closing[GRPO]:
    """What a run trains, in a `with`; a `policy` already loaded is trained in place."""
    return closing(GRPO(options, policy or load_policy(options)))


def grpo(options: GRPOOptions, *, policy: Policy | None = None) -> dict[str, Any]:
    """Train and return the summary; a `policy` already loaded is trained in place."""
    with begin(options) as begun, make_learner(options, policy) as learner:
        return train("grpo", options, learner, begun)


class GRPO(PolicyGradient):
    """Group-relative advantages, one of four losses, one of three normalisers."""

    options: GRPOOptions

    def __init__(self, options: GRPOOptions, policy: Policy) -> None:
        super().__init__(options, policy)
        self.reference = load_reference(policy, options) if options.beta else None

    def draw(self, index: int) -> Sampled:
        """A batch; with dynamic sampling only groups whose rewards differ, until the batch is full."""
        o = self.options
        groups, metrics = self.sample(index)
        if not o.dynamic_sampling:
            return Sampled(groups, metrics)
        kept, tried = [g for g in groups if self._has_signal(g)], len(groups)
        for round_ in range(1, o.dynamic_sampling_rounds):
            if len(kept) >= o.num_prompts:
                break
            more, extra = self.sample(index, round_=round_, count=o.num_prompts - len(kept))
            tried += len(more)
            kept += [g for g in more if self._has_signal(g)]
            metrics = {name: value + extra.get(name, 0.0) for name, value in metrics.items()}
        if len(kept) < o.num_prompts:
            cut = ", or too few completions end within max_completion_length" if self.drop_truncated else ""
            raise DataError(
                f"dynamic_sampling: {tried} prompts in {o.dynamic_sampling_rounds} rounds gave {len(kept)} groups with "
                f"different rewards of {o.num_prompts} wanted; the task is too easy or too hard for this model{cut}"
            )
        return Sampled(kept[: o.num_prompts], {**metrics, "rollout/prompts_tried": float(tried)})

    @torch.no_grad()
    def estimate(self, experience: Experience, sampled: Sampled) -> dict[str, float]:
        """Fill in old_logp and the advantage of every token."""
        o, flat, model = self.options, experience.flat, self.policy.model
        scored_N = None
        if not self.on_policy:
            batches, order = experience.batches(range(experience.size), o.micro_batch_tokens, device=model.device)
            scored_N = experience.in_order(score(model, batches, temperature=o.temperature), order).logp_N
        metrics = self.old_logp(experience, scored_N=scored_N)
        if o.beta:
            flat["ref_logp"] = self.reference_logp(experience, self.reference)
            metrics["objective/kl"] = float(experience.sequence_sums(k1(flat["old_logp"], flat["ref_logp"])).mean())

        scores_B, shaping = self.shaped(experience)
        rewards_PG, mask_PG, place_B = group_rewards(experience, scores_B, len(sampled.groups))
        advantages_B = self._advantages(rewards_PG, mask_PG).flatten()[place_B]
        flat["advantages"] = experience.per_sequence(advantages_B)
        return metrics | shaping

    def _has_signal(self, group: RolloutGroup) -> bool:
        """Whether what is compared differs among those trained on (max > min: a deviation is fooled by rounding)."""
        if not any(trainable(r, drop_truncated=self.drop_truncated) for r in group.rollouts):
            return False
        scores_B, _ = self.shaped(Experience.of([group], drop_truncated=self.drop_truncated))
        return bool(scores_B.max() > scores_B.min())

    def _advantages(self, rewards_PG: Tensor, mask_PG: Tensor) -> Tensor:
        kind = self.options.advantage
        if kind == "grpo":
            return group_normalized(rewards_PG, mask_PG)
        if kind == "rloo":
            return leave_one_out(rewards_PG, mask_PG)
        centred = group_centered(rewards_PG, mask_PG)
        return whiten(centred, mask_PG) if kind == "reinforce++" else centred

    def optimize(self, experience: Experience, step: int) -> dict[str, float]:
        """The passes over the step's rollouts; metrics are means over the optimizer steps that were made."""
        o, model = self.options, self.policy.model
        normalizer = _normalizer(o)
        constant = o.max_completion_length if normalizer == "constant" else None
        made: list[dict[str, float]] = []
        for iteration in range(o.num_iterations):
            place = step * o.num_iterations + iteration
            for members in experience.minibatches(o.num_minibatches, seed=o.seed, epoch=place):
                experience.set_weights(members, normalizer, constant=constant)
                trained, share = self._with_gradient(experience, members)
                batches, _ = experience.batches(trained, o.micro_batch_tokens, device=model.device)
                taken = self.take_over(experience, trained, batches, step) if not made else {}
                done = self.update(
                    step,
                    batches,
                    self._loss,
                    temperature=o.temperature,
                    entropy=o.entropy_coef > 0,
                    gap_to="rollout_logp" if self.on_policy and not made and not taken else None,
                    share=share,
                )
                made.append({"rollout/skipped": 1 - len(trained) / len(members), **taken, **done})
        self.updated()
        return means_of(made)

    def _with_gradient(self, experience: Experience, members: list[int]) -> tuple[list[int], float]:
        """The members whose loss can have a gradient, and their share of the weight.

        Every policy loss is a multiple of the advantage: without KL and entropy a completion of advantage 0 changes
        nothing but the denominator, which it stays in. One is kept where all are such: the moments still decay.
        """
        o, flat = self.options, experience.flat
        if o.beta or o.entropy_coef:
            return members, 1.0
        moving_B = experience.sequence_sums(flat["advantages"].abs()) > 0
        trained = [i for i in members if moving_B[i]] or members[:1]
        weight_B = experience.sequence_sums(flat["weight"])
        return trained, float(weight_B[trained].sum() / weight_B[members].sum())

    def _loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        o, f = self.options, batch.fields
        assert out.logp_N is not None
        high = o.epsilon if o.epsilon_high is None else o.epsilon_high
        old, advantages = f["old_logp"], f["advantages"]
        if o.loss == "gspo":
            policy_N = _sequence_loss(batch, out.logp_N, clip_low=o.epsilon, clip_high=high)
        elif o.loss == "cispo":
            policy_N = clipped_is_reinforce(out.logp_N, old, advantages, clip_high=high)
        elif o.loss == "sapo":
            policy_N = soft_gated(out.logp_N, old, advantages, tau_positive=o.tau_positive, tau_negative=o.tau_negative)
        else:
            policy_N = clipped_surrogate(out.logp_N, old, advantages, clip_low=o.epsilon, clip_high=high)
        if "importance" in f:
            policy_N = policy_N * f["importance"]
        loss_N = policy_N
        metrics = {"loss/policy": policy_N, **ratio_metrics(out.logp_N, f, o.epsilon, high)}
        if o.beta:
            loss_N = loss_N + o.beta * importance_k1(out.logp_N, f["ref_logp"], old)
        if out.entropy_N is not None:
            loss_N = loss_N - o.entropy_coef * out.entropy_N
            metrics["policy/entropy"] = out.entropy_N
        return loss_N, metrics


def _normalizer(options: GRPOOptions) -> Normalizer:
    if options.normalizer == "auto":
        return "sequence" if options.loss in ("gspo", "sapo") else "token"
    return options.normalizer


def _sequence_loss(batch: Batch, logp_N: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """GSPO's loss of each sequence, given to each of its tokens: their weighted mean is the sequence's loss."""
    sequences = int(batch.sequence_N[-1]) + 1
    logp_BT, mask_BT = padded_from_flat(logp_N, batch.sequence_N, sequences)
    old_BT, _ = padded_from_flat(batch.fields["old_logp"], batch.sequence_N, sequences)
    advantages_BT, _ = padded_from_flat(batch.fields["advantages"], batch.sequence_N, sequences)
    loss_B = sequence_clipped_surrogate(
        logp_BT, old_BT, advantages_BT[:, 0], mask_BT, clip_low=clip_low, clip_high=clip_high
    )
    return loss_B[batch.sequence_N]
