"""Minimum-risk training of an encoder-decoder (MRT; Shen et al. 2016, arXiv 1512.02433, equations 8 to 12).

for each batch of sources x:
    S(x)  = the different ones among G sampled targets, and the reference
    Q(y)  = P(y | x)^alpha / sum over S(x) of P^alpha         P: the whole target's probability
    loss  = mean over sources of sum_{y in S(x)} Q(y) cost(y)      cost = 1 - reward
    gradient: alpha Q(y) (cost(y) - E_Q cost) grad log P(y)        summed over S(x)
    AdamW step on the float32 masters

The gradient couples all of S(x), so it is taken in two passes: the first, without gradient, gives every log P(y) and
from them the weight d loss / d log P(y); the second backpropagates weight * log P(y), target by target. That is the
loss's own gradient, whatever the micro-batches. Dropout is off: Q must be the distribution that sampled.
"""

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from upslope.build import Policy
from upslope.functional.supervised_losses import minimum_risk
from upslope.loop.pairs import PairData, PairLearner
from upslope.options.supervised import Seq2SeqOptions
from upslope.rewards.judge import reward_metrics
from upslope.rewards.summands import Surroundings
from upslope.rollout import collect, length_metrics
from upslope.training.experience import Experience, group_rewards
from upslope.training.step import Outputs, score
from upslope.training.stopping import StepResult
from upslope.types import Batch, Prompt, Rollout, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer


def risk_weights(
    logp_PG: Tensor, costs_PG: Tensor, mask_PG: Tensor | None = None, *, alpha: float
) -> tuple[Tensor, Tensor]:
    """(risk [P], d risk_p / d logp_pg [P, G]): alpha Q (cost - E_Q cost), by the derivative of `minimum_risk`."""
    logp = logp_PG.detach().requires_grad_()
    with torch.enable_grad():
        risk = minimum_risk(logp, costs_PG, mask_PG, alpha=alpha)
        (weights,) = torch.autograd.grad(risk.sum(), logp)
    return risk.detach(), weights


def distinct(rollouts: list[Rollout]) -> list[Rollout]:
    """The first rollout of each token sequence: the paper's S(x) is a set."""
    found: dict[tuple[int, ...], Rollout] = {}
    for rollout in rollouts:
        found.setdefault(tuple(rollout.tokens), rollout)
    return list(found.values())


class MinimumRisk(PairLearner):
    """Expected cost over the sampled set."""

    def __init__(self, options: Seq2SeqOptions, policy: Policy, data: PairData) -> None:
        super().__init__(options, policy, data, sequences=options.batch_size * options.num_samples)
        here = Surroundings(policy.tokenizer, policy.model.device, policy.folder)
        self.judge = make_scorer(data.task, options.reward, surroundings=here)

    def step(self, step: int) -> StepResult:
        """Sample, merge, judge, two passes, one update."""
        o, started = self.options, time.perf_counter()
        chosen = [self.prompts[i] for i in self.order.take(o.batch_size)]
        groups, metrics = self.sample([prompt for prompt, _ in chosen], step)
        metrics["seconds/rollout"] = time.perf_counter() - started
        began = time.perf_counter()
        sets = [RolloutGroup(g.prompt, distinct(g.rollouts)) for g in groups]
        metrics["risk/distinct"] = sum(len(g.rollouts) for g in sets) / len(sets)
        if o.include_reference:
            self._add_references(sets, chosen)
        experience = Experience.of(sets)
        metrics |= self.optimize(experience, len(sets), step)
        metrics["seconds/update"] = time.perf_counter() - began
        tokens = sum(len(r.tokens) for r in experience.rollouts)
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - started)
        metrics["num_tokens"] = float(experience.num_trained)
        if self.run is not None:
            self.run.record_rollouts(step + 1, sets)
        return StepResult(metrics, experience.num_trained)

    def sample(self, prompts: list[Prompt], step: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """G judged targets of every source, from the policy's own distribution."""
        o = self.options
        params = SamplingParams(max_tokens=o.max_completion_length, n=o.num_samples, seed=o.seed * 1_000_003 + step)
        self.policy.model.eval()
        with torch.no_grad():
            groups, judged = collect(self.engine, self.policy.tokenizer, self.judge, prompts, params)
        seconds = judged.pop("reward/seconds")
        rollouts = [r for g in groups for r in g.rollouts]
        return groups, {**judged, "seconds/reward": seconds, **reward_metrics(groups), **length_metrics(rollouts)}

    def _add_references(self, sets: list[RolloutGroup], chosen: list[tuple[Prompt, list[int]]]) -> None:
        """Put each source's reference into its set, unless it was sampled."""
        added = []
        for group, (prompt, tokens) in zip(sets, chosen, strict=True):
            if any(r.tokens == tokens for r in group.rollouts):
                continue
            text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
            head = group.rollouts[0].prompt_tokens
            unknown = [math.nan] * len(tokens)
            reference = Rollout(
                head, tokens, [True] * len(tokens), unknown, unknown, "stop", text, self.options.num_samples
            )
            group.rollouts.append(reference)
            added.append(RolloutGroup(prompt, [reference]))
        if added:
            self.judge.judge(added)

    def optimize(self, experience: Experience, count: int, step: int) -> dict[str, float]:
        """The two passes over the step's sets and one AdamW step; returns the risk and the update's metrics."""
        o, model = self.options, self.policy.model
        batches, order = experience.batches(range(experience.size), o.micro_batch_tokens, device=model.device)
        logp_N = experience.in_order(score(model, batches), order).logp_N
        assert logp_N is not None
        for rollout, logp in zip(
            experience.rollouts, logp_N.split([len(r.tokens) for r in experience.rollouts]), strict=True
        ):
            if rollout.sample == o.num_samples:  # the reference: nothing sampled it
                rollout.policy_logprobs = rollout.sampling_logprobs = logp.tolist()
        logp_B = experience.sequence_sums(logp_N.double())
        costs_B = torch.tensor([1.0 - (r.reward.value or 0.0) for r in experience.rollouts])
        costs_PG, mask_PG, place_B = group_rewards(experience, costs_B, count)
        logp_PG = torch.zeros(mask_PG.shape, dtype=torch.float64)
        logp_PG.view(-1)[place_B] = logp_B
        risk_P, weight_PG = risk_weights(logp_PG, costs_PG, mask_PG, alpha=o.alpha)
        experience.slope = experience.per_sequence(weight_PG.flatten()[place_B].float())
        experience.weight = torch.full((experience.num_trained,), 1 / count)
        batches, _ = experience.batches(range(experience.size), o.micro_batch_tokens, device=model.device)
        metrics = self.update(step, batches, self._loss)
        self.weights_moved()
        return metrics | {"loss": float(risk_P.mean())}

    @staticmethod
    def _loss(batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return batch.fields["slope"] * out.logp_N, {}

    def close(self) -> None:
        """End the reward workers."""
        self.judge.close()
        super().close()
