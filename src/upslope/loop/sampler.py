"""The judged trajectories of every step: what a policy answers to its task's prompts, and what that is worth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import psutil
import torch
from torch import Tensor

from upslope.build import Policy, make_engine
from upslope.data.batching import PromptStream
from upslope.errors import DataError
from upslope.evaluation.measurement import mean_of
from upslope.evaluation.verdicts import evaluate
from upslope.functional.advantages import has_signal
from upslope.loop.prompts import ask
from upslope.models.decoder.fast import Activations
from upslope.options import GRPOOptions, RLOptions
from upslope.rewards.judge import Judge
from upslope.rewards.summands import Surroundings
from upslope.rollout import collect
from upslope.runs.folder import Run
from upslope.tasks.base import Task, load_task
from upslope.training.checkpoint import Part
from upslope.training.experience import Experience, shaped_rewards, trainable
from upslope.training.stopping import Evaluation
from upslope.types import Prompt, Reward, Rollout, RolloutGroup, SamplingParams
from upslope.workers.rewards import make_scorer


class Sampler(Part):
    """Samples and judges; `next(step)` are the trajectories to train on at a step, wherever they were made.

    The engine reads the very weights that are trained: after each update its version goes up by one, so a step's
    rollouts come from the policy that is about to be updated, or with a rollout_lag from the one some steps before.
    `exact`: the sampler's log-probs are known to be the trainer's, bit for bit. greedy: each batch also has a judged
    greedy reply to each of its prompts.
    """

    def __init__(self, options: RLOptions, policy: Policy, *, greedy: bool = False) -> None:
        self.options, self.policy, self.greedy = options, policy, greedy
        self.task = load_task(options.task)
        self.judge = judge_of(options, policy, self.task)
        asked = ask(options, policy, self.task)
        self.prompts, self.eval_prompts, self.account = asked.train, asked.held_out, asked.account
        self.longest_prompt = asked.longest
        self.order = PromptStream(len(self.prompts), seed=options.seed)
        self.queue = RolloutQueue(options.rollout_lag, self.prompts)
        self.exact = samples_exactly(options, policy)
        self.drop_truncated = options.truncated == "mask"
        self.engine = make_engine(
            policy,
            sequences=max(options.num_prompts * options.num_generations, len(self.eval_prompts)),
            longest=asked.longest + options.max_completion_length,
        )

    @cached_property
    def activations(self) -> Activations | None:
        """What is kept of a step's sampling for its first update."""
        return room_for_activations(self.options, self.policy, self.longest_prompt)

    def next(self, step: int) -> Sampled:
        """The judged rollouts to train on at this step, sampled `rollout_lag` steps ago."""
        sampled = self.queue.next(step, self.draw)
        versions = [r.version for g in sampled.groups for r in g.rollouts]
        sampled.metrics["rollout/lag"] = float(self.engine.version - min(versions))
        return sampled

    def draw(self, index: int) -> Sampled:
        """Sample the run's `index`-th batch with the weights as they are."""
        o = self.options
        if isinstance(o, GRPOOptions) and o.dynamic_sampling:
            return self._draw_varied(index, o)
        sampled = Sampled(*self.sample(index))
        if self.greedy:
            self._answer_greedily(sampled)
        return sampled

    def sample(
        self, step: int, *, round_: int = 0, count: int | None = None
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The step's judged groups; what is sampled depends on (seed, step, round, prompt, sample) only."""
        o, started = self.options, time.perf_counter()
        prompts = [self.prompts[i] for i in self.order.take(count or o.num_prompts)]
        params = SamplingParams(
            max_tokens=o.max_completion_length,
            n=o.num_generations,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
            seed=(o.seed * 1_000_003 + step) * 1009 + round_,
        )
        if self.activations is not None and not round_:
            self.activations.clear()
        with self.engine.keeping(self.activations):
            groups, judged = self._collect(prompts, params)
        judged["seconds/reward"] = judged.pop("reward/seconds")
        judged["seconds/rollout"] = time.perf_counter() - started - judged["seconds/reward"]
        return groups, judged

    def _collect(
        self, prompts: Sequence[Prompt], params: SamplingParams
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        self.policy.model.eval()
        with torch.no_grad():
            found = collect(self.engine, self.policy.tokenizer, self.judge, prompts, params)
        self.engine.sleep()
        return found

    def _draw_varied(self, index: int, o: GRPOOptions) -> Sampled:
        """Only groups whose rewards differ, until the batch is full (DAPO's dynamic sampling, 2503.14476)."""
        groups, metrics = self.sample(index)
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

    def _has_signal(self, group: RolloutGroup) -> bool:
        """Whether what is compared differs among those trained on."""
        if not any(trainable(r, drop_truncated=self.drop_truncated) for r in group.rollouts):
            return False
        scores_B, _ = shaped_rewards(Experience.of([group], drop_truncated=self.drop_truncated), self.options)
        return bool(has_signal(scores_B[None]))

    def _answer_greedily(self, sampled: Sampled) -> None:
        """A judged greedy reply to each prompt; where it has no reward, the prompt's completions are errors, too."""
        started = time.perf_counter()
        params = SamplingParams(max_tokens=self.options.max_completion_length, temperature=0.0)
        sampled.greedy, judged = self._collect([group.prompt for group in sampled.groups], params)
        for group, reply in zip(sampled.groups, sampled.greedy, strict=True):
            reward = reply.rollouts[0].reward
            if reward.value is None:
                for rollout in group.rollouts:
                    rollout.reward = Reward(None, error=f"the greedy reply could not be judged: {reward.error}")
        sampled.metrics["reward/errors"] += judged["reward/errors"]
        sampled.metrics["seconds/rollout"] += time.perf_counter() - started

    def evaluate(self, step: int, run: Run | None) -> Evaluation | None:
        """Greedy accuracy (or the mean reward, where the task has no verdict) on held-out prompts."""
        o = self.options
        if not self.eval_prompts:
            return None
        params = SamplingParams(max_tokens=o.max_completion_length, temperature=o.eval_temperature, seed=o.seed)
        groups, _ = self._collect(self.eval_prompts, params)
        if run is not None:
            run.record_rollouts(step, groups, split="eval")
        judged = [r.reward for g in groups for r in g.rollouts]
        rewards = mean_of("reward", [reward.value for reward in judged if reward.value is not None]).interval()
        metrics: dict[str, Any] = {"reward": {**rewards, "errors": len(judged) - rewards["n"]}}
        if any(reward.correct is not None for reward in judged):
            metrics["accuracy"] = evaluate(groups)
            return Evaluation("accuracy", metrics, loss=-rewards["value"])
        return Evaluation("reward", metrics)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The rollouts that wait."""
        return {"queue": self.queue.tensors()} if self.queue.lag else {}

    def state(self) -> dict[str, Any]:
        """The rollouts that wait."""
        return {"queue": self.queue.state()}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Put back the rollouts that wait."""
        if self.queue.lag:
            self.queue.load(tensors["queue"], state["queue"])


def judge_of(options: RLOptions, policy: Policy, task: Task) -> Judge:
    """What judges the run's completions."""
    return make_scorer(
        task,
        options.reward,
        processes=options.reward_workers,
        timeout_s=options.reward_timeout,
        surroundings=Surroundings(policy.tokenizer, policy.model.device, policy.folder),
    )


def samples_exactly(options: RLOptions, policy: Policy) -> bool:
    """Whether the sampler has the trainer's bits and its present weights."""
    return policy.model.exact and policy.lora is None and not options.rollout_lag


def room_for_activations(options: RLOptions, policy: Policy, longest_prompt: int) -> Activations | None:
    """Room for the activations of a step's tokens, as far as the memory allows; None where they cannot be kept."""
    if not samples_exactly(options, policy):
        return None
    rounds = options.dynamic_sampling_rounds if isinstance(options, GRPOOptions) and options.dynamic_sampling else 1
    tokens = rounds * options.num_prompts * (longest_prompt + options.num_generations * options.max_completion_length)
    given = options.activations_gb
    limit = psutil.virtual_memory().available / 3 if given is None else given * 1e9
    return Activations.of(policy.model, tokens=tokens, limit_bytes=int(limit))


@dataclass(slots=True)
class Sampled:
    """One step's judged rollouts with what was measured meanwhile; `greedy` holds a greedy reply to each prompt."""

    groups: list[RolloutGroup]
    metrics: dict[str, float]
    greedy: list[RolloutGroup] = field(default_factory=list)


class RolloutQueue:
    """First in, first out, always `lag` batches long between two steps.

    `prompts` are those the groups refer to; a checkpoint holds their places in this list.
    """

    def __init__(self, lag: int, prompts: Sequence[Prompt]) -> None:
        self.lag, self.prompts = lag, prompts
        self.waiting: list[Sampled] = []

    def next(self, step: int, draw: Callable[[int], Sampled]) -> Sampled:
        """The batch to train on at `step`; `draw(i)` samples the i-th batch of the run with the present weights.

        Seconds are those spent now; every other metric belongs to the batch that is returned.
        """
        spent: dict[str, float] = {}
        while len(self.waiting) <= self.lag:
            drawn = draw(step + len(self.waiting))
            for name in [name for name in drawn.metrics if name.startswith("seconds/")]:
                spent[name] = spent.get(name, 0.0) + drawn.metrics.pop(name)
            self.waiting.append(drawn)
        oldest = self.waiting.pop(0)
        oldest.metrics |= spent
        return oldest

    def tensors(self) -> dict[str, Tensor]:
        """The tokens of everything that waits, end to end, and their log-probs in float64."""
        rollouts = self._rollouts()
        return {
            "prompt_tokens": torch.tensor([t for r in rollouts for t in r.prompt_tokens], dtype=torch.int64),
            "tokens": torch.tensor([t for r in rollouts for t in r.tokens], dtype=torch.int64),
            "mask": torch.tensor([m for r in rollouts for m in r.mask], dtype=torch.bool),
            "sampling_logprobs": torch.tensor([x for r in rollouts for x in r.sampling_logprobs], dtype=torch.float64),
            "policy_logprobs": torch.tensor([x for r in rollouts for x in r.policy_logprobs], dtype=torch.float64),
        }

    def state(self) -> list[dict[str, Any]]:
        """Everything else about what waits, as JSON."""
        place = {id(prompt): i for i, prompt in enumerate(self.prompts)}
        return [
            {
                "metrics": dict(batch.metrics),
                "groups": [_group_state(g, place) for g in batch.groups],
                "greedy": [_group_state(g, place) for g in batch.greedy],
            }
            for batch in self.waiting
        ]

    def load(self, tensors: Mapping[str, Tensor], state: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `tensors` and `state` described; nothing, and says so, where prompts are others now."""
        groups = [g for batch in state for g in (*batch["groups"], *batch["greedy"])]
        if not all(self._is_known(g) for g in groups):
            print("the rollouts that waited answered other prompts: they are sampled anew", file=sys.stderr)
            return
        columns = {name: x.tolist() for name, x in tensors.items()}
        used = dict.fromkeys(columns, 0)

        def take(name: str, count: int) -> list[Any]:
            used[name] += count
            return columns[name][used[name] - count : used[name]]

        def group_of(item: Mapping[str, Any]) -> RolloutGroup:
            return RolloutGroup(self.prompts[item["prompt"]], [_rollout_of(r, take) for r in item["rollouts"]])

        self.waiting = [
            Sampled(
                [group_of(g) for g in batch["groups"]], dict(batch["metrics"]), [group_of(g) for g in batch["greedy"]]
            )
            for batch in state
        ]

    def _is_known(self, item: Mapping[str, Any]) -> bool:
        """Whether the prompt is where it was; a checkpoint of an older version does not say which one it was."""
        keys = [prompt.key for prompt in self.prompts[item["prompt"] : item["prompt"] + 1]]
        return bool(keys) and item.get("key", keys[0]) == keys[0]

    def _rollouts(self) -> list[Rollout]:
        return [r for batch in self.waiting for g in (*batch.groups, *batch.greedy) for r in g.rollouts]


def _group_state(group: RolloutGroup, place: Mapping[int, int]) -> dict[str, Any]:
    prompt = group.prompt
    return {"prompt": place[id(prompt)], "key": prompt.key, "rollouts": [_rollout_state(r) for r in group.rollouts]}


def _rollout_state(rollout: Rollout) -> dict[str, Any]:
    return {
        "lengths": [len(rollout.prompt_tokens), len(rollout.tokens)],
        "finish_reason": rollout.finish_reason,
        "text": rollout.text,
        "sample": rollout.sample,
        "version": rollout.version,
        "reward": asdict(rollout.reward),
    }


def _rollout_of(item: Mapping[str, Any], take: Callable[[str, int], list[Any]]) -> Rollout:
    prompt, own = item["lengths"]
    reward = {**item["reward"], "steps": [(index, value) for index, value in item["reward"]["steps"]]}
    return Rollout(
        prompt_tokens=take("prompt_tokens", prompt),
        tokens=take("tokens", own),
        mask=take("mask", own),
        sampling_logprobs=take("sampling_logprobs", own),
        policy_logprobs=take("policy_logprobs", own),
        finish_reason=item["finish_reason"],
        text=item["text"],
        sample=item["sample"],
        version=item["version"],
        reward=Reward(**reward),
    )
