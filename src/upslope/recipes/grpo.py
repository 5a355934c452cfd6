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

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from upslope import plugins
from upslope.build import Policy
from upslope.functional.kl import importance_k1
from upslope.loop.companions import Reference
from upslope.loop.learner import RolloutLearner, means_of, rollout_metrics
from upslope.loop.objective import AdvantageInput, corrected, estimate, with_value_and_entropy
from upslope.loop.session import Recipe
from upslope.loop.updater import score_before_update
from upslope.options import GRPOOptions
from upslope.options.policy import GROUP_ADVANTAGES, LOSSES
from upslope.training.experience import Experience, Normalizer, shaped_rewards, token_rewards
from upslope.training.step import Forward, Outputs
from upslope.training.stopping import StepResult
from upslope.types import Batch


class GRPO(RolloutLearner):
    """Group-relative advantages, one of four losses, one of three normalisers."""

    options: GRPOOptions

    def __init__(self, options: GRPOOptions, policy: Policy) -> None:
        self.advantage = plugins.load(options.advantage, GROUP_ADVANTAGES, kind="advantage", takes=("a",)).function
        self.policy_loss = plugins.load(options.loss, LOSSES, kind="loss", takes=("x",)).function
        self.reference = Reference(options, policy, options.beta)
        super().__init__(options, policy)

    def step(self, step: int) -> StepResult:
        """Sample, judge, score, compare within the groups, update."""
        o, sampler = self.options, self.sampler
        sampled, started = sampler.next(step), time.perf_counter()
        x = Experience.of(sampled.groups, drop_truncated=sampler.drop_truncated)
        metrics = sampled.metrics | rollout_metrics(sampled.groups, x)

        with torch.no_grad():
            metrics |= score_before_update(o, x, sampler)
            if o.beta:
                metrics |= self.reference.score(x, o.temperature)
            scores_B, penalties = shaped_rewards(x, o)
            judged = AdvantageInput(o, x, scores_B, token_rewards(x, scores_B), len(sampled.groups))
            x.advantages = x.unpadded(estimate(self.advantage, judged))

        normalizer = _normalizer(o)
        forward = Forward(o.temperature, entropy=o.entropy_coef > 0)
        made: list[dict[str, float]] = []
        for iteration in range(step * o.num_iterations, (step + 1) * o.num_iterations):
            for members in x.minibatches(o.num_minibatches, seed=o.seed, epoch=iteration):
                x.set_weights(members, normalizer, constant=o.max_completion_length)
                trained, share = self._with_gradient(x, members)
                done = self.updater.update_on(
                    x, trained, step, self.loss, forward, sampler=sampler, first=not made, share=share
                )
                made.append({"rollout/skipped": 1 - len(trained) / len(members), **done})
        return self.finish(step, sampled.groups, x, metrics | penalties | means_of(made), started)

    def loss(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The policy loss of the options, KL to the reference, entropy."""
        o, f = self.options, batch.fields
        loss_N, metrics = corrected(self.policy_loss, o, batch, out)
        if o.beta:
            loss_N = loss_N + o.beta * importance_k1(out.logp_N, f["ref_logprobs"], f["old_logprobs"])
        return with_value_and_entropy(o, loss_N, metrics, batch, out, None)

    def _with_gradient(self, x: Experience, members: list[int]) -> tuple[list[int], float]:
        """The members whose loss can have a gradient, and their share of the weight.

        Every built-in loss is a multiple of the advantage: without KL and entropy a completion of advantage 0 changes
        nothing but the denominator, which it stays in. One is kept where all are such: the moments still decay.
        """
        o = self.options
        if o.beta or o.entropy_coef or str(o.loss) not in LOSSES:
            return members, 1.0
        moving_B = x.sequence_sums(x.advantages.abs()) != 0
        trained = [i for i in members if moving_B[i]] or members[:1]
        weight_B = x.sequence_sums(x.weight)
        return trained, float(weight_B[trained].sum() / weight_B[members].sum())


def _normalizer(options: GRPOOptions) -> Normalizer:
    if options.normalizer == "auto":
        return "sequence" if options.loss in ("gspo", "sapo") else "token"
    return options.normalizer


grpo = Recipe("grpo", GRPO.of)
