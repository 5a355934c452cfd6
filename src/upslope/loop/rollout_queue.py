"""Rollouts that wait between being sampled and being trained on: asynchronous sampling, simulated exactly.

With a lag of L the rollouts of step t were sampled by the weights as they were before step t - L (the first L + 1
batches all by the start weights). What waits is part of a checkpoint, so that a resumed run repeats bit for bit.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from upslope.types import Prompt, Reward, Rollout, RolloutGroup


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
