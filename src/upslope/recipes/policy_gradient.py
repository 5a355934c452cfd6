"""What every recipe that samples shares: prompts in order, rollouts, judging, evaluation, checkpoints.

The algorithm itself is in the recipe's own file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from upslope.build import Policy, make_engine
from upslope.evaluation.accuracy import evaluate
from upslope.evaluation.measurement import mean_of
from upslope.functional.policy_losses import importance_weights
from upslope.loop.fingerprint import prompt_row
from upslope.loop.learner import PolicyLearner
from upslope.loop.prompts import ask
from upslope.loop.rollout_queue import RolloutQueue, Sampled
from upslope.loop.session import Evaluation, StepResult
from upslope.models.decoder.activations import Activations
from upslope.models.protocol import CausalModel
from upslope.options import GRPOOptions, RLOptions
from upslope.rewards.judge import Judge, reward_metrics
from upslope.rewards.summands import Surroundings
from upslope.rollout.collect import collect, length_metrics
from upslope.tasks.base import Task
from upslope.tasks.loading import load_task
from upslope.training.experience import Experience, shaped_rewards
from upslope.training.optim import Group
from upslope.training.step import gap_metrics, score
from upslope.types import Batch, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer

__all__ = [
    "PolicyGradient",
    "judge_of",
    "means_of",
    "ratio_metrics",
    "rollout_metrics",
    "room_for_activations",
    "samples_on_policy",
]

_STORED = {
    "old_logp": "trainer_logprobs",
    "ref_logp": "ref_logprobs",
    "values": "values",
    "advantages": "advantages",
    "targets": "returns",
}
"""The flat tensors that are stored with a step's rollouts, and their names there."""


class PolicyGradient(PolicyLearner):
    """Holds policy, engine, task and judge; samples a step's rollouts and measures held-out accuracy.

    The engine reads the very weights that are trained: after each update its version goes up by one, so a step's
    rollouts come from the policy that is about to be updated, or with a rollout_lag from the one some steps before.
    """

    higher_is_better = True

    def __init__(self, options: RLOptions, policy: Policy, *, extra: Sequence[Group] = ()) -> None:
        self.task = load_task(options.task)
        self.judge = judge_of(options, policy, self.task)
        asked = ask(options, policy, self.task)
        self.train_prompts, self.eval_prompts, self.account = asked.train, asked.held_out, asked.account
        super().__init__(options, policy, len(self.train_prompts), extra=extra)
        self.drop_truncated = options.truncated == "mask"
        self.queue = RolloutQueue(options.rollout_lag, self.train_prompts)
        self.engine = make_engine(
            policy,
            sequences=max(options.num_prompts * options.num_generations, len(self.eval_prompts)),
            longest=asked.longest + options.max_completion_length,
        )
        self.activations = room_for_activations(options, policy, asked.longest)

    def step(self, step: int) -> StepResult:
        """Sample, judge, estimate advantages, update."""
        sampled = self.rollouts(step)
        groups, metrics = sampled.groups, sampled.metrics
        started = time.perf_counter()
        experience = Experience.of(groups, drop_truncated=self.drop_truncated)
        metrics |= rollout_metrics(groups, experience)
        metrics |= self.estimate(experience, sampled)
        metrics |= self.optimize(experience, step)
        metrics["seconds/update"] = time.perf_counter() - started
        tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in experience.rollouts)
        metrics["tokens_per_second"] = tokens / (metrics["seconds/update"] + metrics["seconds/rollout"])
        self.record(step, groups, experience)
        return StepResult(metrics, experience.num_trained)

    def estimate(self, experience: Experience, sampled: Sampled) -> dict[str, float]:
        """Fill in old_logp, the advantage of every token and what else the update needs; returns metrics."""
        raise NotImplementedError(f"{type(self).__name__} estimates no advantages")

    def optimize(self, experience: Experience, step: int) -> dict[str, float]:
        """The step's updates; returns their metrics."""
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def rollouts(self, step: int) -> Sampled:
        """The judged rollouts to train on at this step, sampled `rollout_lag` steps ago."""
        sampled = self.queue.next(step, self.draw)
        versions = [r.version for g in sampled.groups for r in g.rollouts]
        sampled.metrics["rollout/lag"] = float(self.engine.version - min(versions))
        return sampled

    def draw(self, index: int) -> Sampled:
        """Sample the run's `index`-th batch with the weights as they are."""
        return Sampled(*self.sample(index))

    def sample(
        self, step: int, *, round_: int = 0, count: int | None = None
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The step's judged groups; what is sampled depends on (seed, step, round, prompt, sample) only."""
        o, started = self.options, time.perf_counter()
        prompts = [self.train_prompts[i] for i in self.order.take(count or o.num_prompts)]
        params = SamplingParams(
            max_tokens=o.max_completion_length,
            n=o.num_generations,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
            seed=(o.seed * 1_000_003 + step) * 1009 + round_,
        )
        self.policy.model.eval()
        if self.activations is not None and not round_:
            self.activations.clear()
        with torch.no_grad(), self.engine.keeping(self.activations):
            groups, judged = collect(self.engine, self.policy.tokenizer, self.judge, prompts, params)
        self.engine.sleep()
        judged["seconds/reward"] = judged.pop("reward/seconds")
        judged["seconds/rollout"] = time.perf_counter() - started - judged["seconds/reward"]
        return groups, judged

    def shaped(self, experience: Experience) -> tuple[Tensor, dict[str, float]]:
        """The reward of each sequence [B] with its penalties, and their means."""
        o = self.options
        return shaped_rewards(
            experience,
            missing_eos_penalty=o.missing_eos_penalty,
            overlong_buffer=o.overlong_buffer,
            max_completion_length=o.max_completion_length,
        )

    @property
    def on_policy(self) -> bool:
        """Whether the sampler's log-probs are known to be the trainer's, bit for bit: no pass to recompute them.

        The first update compares them nevertheless (`rollout/max_logprob_diff`).
        """
        return samples_on_policy(self.options, self.policy)

    def old_logp(self, experience: Experience, *, scored_N: Tensor | None = None) -> dict[str, float]:
        """Fill in old_logp [N], and the correction where the sampler's weights were others; returns metrics.

        scored_N: the trainer's log-probs, needed unless `on_policy`.
        """
        flat = experience.flat
        if scored_N is None:
            flat["old_logp"], metrics = flat["rollout_logp"], {}
        else:
            flat["old_logp"], metrics = scored_N, gap_metrics((flat["rollout_logp"] - scored_N).abs())
        exact = not metrics or metrics["rollout/max_logprob_diff"] == 0
        weights = self.correction(experience, flat["old_logp"], exact=exact)
        if weights is not None:
            flat["importance"] = weights
            metrics["rollout/importance_mean"] = float(weights.mean())
        return {**metrics, "objective/entropy": float(-flat["old_logp"].mean())}

    def replay(self, batches: Sequence[Batch]) -> float:
        """Have micro-batches start from the sampler's activations; the share of their tokens that do.

        Only while the weights are those that sampled.
        """
        if self.activations is None:
            return 0.0
        kept = sum(batch.tokens_T.shape[0] for batch in batches if self.activations.attach(batch))
        return kept / sum(batch.tokens_T.shape[0] for batch in batches)

    def take_over(
        self, experience: Experience, members: Sequence[int], batches: Sequence[Batch], step: int
    ) -> dict[str, float]:
        """`replay` for an update; metrics, or none where nothing could be taken over.

        What was taken over cannot show whether sampler and trainer agree: so one of the members, another one at each
        step, goes through the network again, and its log-probs are compared.
        """
        share = self.replay(batches)
        if not share:
            return {}
        o, device = self.options, self.policy.model.device
        (one,), _ = experience.batches([members[step % len(members)]], o.micro_batch_tokens, device=device)
        logp_N = score(self.policy.model, [one], temperature=o.temperature).logp_N
        assert logp_N is not None
        return {"rollout/replayed": share, **gap_metrics((one.fields["rollout_logp"] - logp_N).abs())}

    def reference_logp(self, experience: Experience, reference: CausalModel | None) -> Tensor:
        """Log-probs of the step's tokens under the start model: a frozen copy, or the policy without its adapters."""
        o = self.options
        device = self.policy.model.device
        batches, order = experience.batches(range(experience.size), o.micro_batch_tokens, device=device)
        if reference is not None:
            out = score(reference, batches, temperature=o.temperature)
        else:
            with self.policy.as_reference() as model:
                out = score(model, batches, temperature=o.temperature)
        logp_N = experience.in_order(out, order).logp_N
        assert logp_N is not None
        return logp_N

    def correction(self, experience: Experience, trainer_logp_N: Tensor, *, exact: bool) -> Tensor | None:
        """Importance weights [N] of the trainer's policy against the distribution that was sampled from, or None."""
        o = self.options
        level = o.rollout_correction
        if level == "none" or (level == "auto" and exact):
            return None
        return experience.unpadded(
            importance_weights(
                experience.padded(trainer_logp_N),
                experience.padded(experience.flat["sampling_logp"]),
                experience.mask_BT,
                level="token" if level == "auto" else level,
                high=o.rollout_correction_cap,
            )
        )

    def evaluate(self, step: int) -> Evaluation | None:
        """Greedy accuracy (or the mean reward, where the task has no verdict) on held-out prompts."""
        o = self.options
        if not self.eval_prompts:
            return None
        params = SamplingParams(max_tokens=o.max_completion_length, temperature=o.eval_temperature, seed=o.seed)
        self.policy.model.eval()
        with torch.no_grad():
            groups, _ = collect(self.engine, self.policy.tokenizer, self.judge, self.eval_prompts, params)
        self.engine.sleep()
        if self.run is not None:
            self.run.record_rollouts(step, groups, split="eval")
        judged = [r.reward for g in groups for r in g.rollouts]
        rewards = mean_of("reward", [reward.value for reward in judged if reward.value is not None]).interval()
        metrics: dict[str, Any] = {"reward": {**rewards, "errors": len(judged) - rewards["n"]}}
        if any(reward.correct is not None for reward in judged):
            metrics["accuracy"] = evaluate(groups)
            return Evaluation("accuracy", metrics, loss=-rewards["value"])
        return Evaluation("reward", metrics)

    def record(self, step: int, groups: Sequence[RolloutGroup], experience: Experience) -> None:
        """Store the step's rollouts with the trainer's per-token numbers; those left out of the update have none."""
        if self.run is None:
            return
        place = {id(r): i for i, r in enumerate(experience.rollouts)}
        counts = torch.bincount(experience.sequence_N, minlength=experience.size).tolist()
        split = {name: experience.flat[name].split(counts) for name in _STORED if name in experience.flat}
        rollouts = [r for g in groups for r in g.rollouts]
        arrays = {
            _STORED[name]: [parts[place[id(r)]].tolist() if id(r) in place else None for r in rollouts]
            for name, parts in split.items()
        }
        self.run.record_rollouts(step + 1, groups, arrays=arrays)

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        return self.policy.tokenizer, (prompt_row(prompt) for prompt in self.train_prompts)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments and the rollouts that wait; the policy's weights are in the model folder."""
        return {**super().tensors(), **({"queue": self.queue.tensors()} if self.queue.lag else {})}

    def state(self) -> dict[str, Any]:
        """Data position, weight version, and the rollouts that wait."""
        return {**super().state(), "queue": self.queue.state()}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        super().load(model, tensors, state)
        if self.queue.lag:
            self.queue.load(tensors["queue"], state["queue"])

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint; the recipe's own tensors in "critic" complete the model folder."""
        return {**super().trained_weights(model, tensors), **tensors.get("critic", {})}

    def close(self) -> None:
        """End the reward workers."""
        self.judge.close()


def judge_of(options: RLOptions, policy: Policy, task: Task) -> Judge:
    """What judges the run's completions."""
    return make_scorer(
        task,
        options.reward,
        processes=options.reward_workers,
        timeout_s=options.reward_timeout,
        surroundings=Surroundings(policy.tokenizer, policy.model.device, policy.folder),
    )


def samples_on_policy(options: RLOptions, policy: Policy) -> bool:
    """Whether the sampler has the trainer's bits and its present weights."""
    return policy.model.exact and policy.lora is None and not options.rollout_lag


def room_for_activations(options: RLOptions, policy: Policy, longest_prompt: int) -> Activations | None:
    """Room for the activations of a step's tokens, as far as the memory allows; None where they cannot be kept."""
    if not samples_on_policy(options, policy):
        return None
    rounds = options.dynamic_sampling_rounds if isinstance(options, GRPOOptions) and options.dynamic_sampling else 1
    tokens = rounds * options.num_prompts * (longest_prompt + options.num_generations * options.max_completion_length)
    given = options.activations_gb
    limit = psutil.virtual_memory().available / 3 if given is None else given * 1e9
    return Activations.of(policy.model, tokens=tokens, limit_bytes=int(limit))


def means_of(made: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step's updates, each averaged over the updates that have it, and how many there were."""
    names = dict.fromkeys(name for metrics in made for name in metrics)
    found = {name: [m[name] for m in made if name in m] for name in names}
    return {**{name: sum(x) / len(x) for name, x in found.items()}, "optimizer_steps": float(len(made))}


def rollout_metrics(groups: Sequence[RolloutGroup], experience: Experience) -> dict[str, float]:
    """Rewards and their parts, lengths, and how much of the step is left out of the update."""
    rollouts = [r for g in groups for r in g.rollouts]
    return reward_metrics(groups) | {
        **length_metrics(rollouts),
        "rollout/left_out": float(len(rollouts) - experience.size),
        "num_tokens": float(experience.num_trained),
    }


def ratio_metrics(logp_N: Tensor, fields: Mapping[str, Tensor], low: float, high: float) -> dict[str, Tensor]:
    """Per token: KL to the policy that sampled (k3), whether the clip removes the gradient, the ratio."""
    log_ratio = logp_N.detach() - fields["old_logp"]
    ratio, advantages = log_ratio.exp(), fields["advantages"]
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return {"policy/approx_kl": ratio - 1 - log_ratio, "policy/clipfrac": clipped.float(), "val/ratio": ratio}
