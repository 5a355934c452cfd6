"""A learned reward: a reward model that judges rollouts, beside or in place of other rewards.

    --reward reward_model:path=runs/rm/checkpoints/last/model@1.0

It reads the very tokens that were sampled, in packed batches that share prompts, on the policy's device. That needs
one vocabulary; a reward model of another reads the text instead when retokenize=true says so. An outcome model gives
the score after the last token; a process model gives each step's probability (Reward.steps) and puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from upslope.data.batching import collate, split_by_tokens
from upslope.data.chat import load_tokenizer, token_count
from upslope.data.examples import answer, step_ends
from upslope.devices.hardware import choose_dtype
from upslope.errors import ConfigError, DataError, ModelError
from upslope.models.files.reward_folder import RewardSettings, load_reward_folder
from upslope.models.files.sources import resolve
from upslope.models.heads import ScalarHead
from upslope.models.protocol import CausalModel
from upslope.training.step import score
from upslope.training.units import after_tokens
from upslope.types import Example, Prompt, Reward, Rollout, RolloutGroup

__all__ = ["AGGREGATES", "RewardModel", "load_reward_model"]

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "last": lambda steps: steps[-1],
    "mean": lambda steps: math.fsum(steps) / len(steps),
}
"""From the probabilities of a solution's steps to its reward (2305.20050 multiplies; Math-Shepherd takes the least)."""


def load_reward_model(
    path: str,
    aggregate: str = "",
    retokenize: bool = False,
    dtype: str = "auto",
    batch_tokens: int = 8192,
    *,
    tokenizer: Any,
    device: Any,
    policy_folder: Path,
) -> RewardModel:
    """The reward `reward_model:path=FOLDER`; `aggregate` goes over what a process model was trained with.

    ModelError: the folder is no reward model, or has another tokenizer than the policy (unless retokenize).
    """
    folder = resolve(path)
    compute, _ = choose_dtype(dtype, device)
    model, head, settings = load_reward_folder(folder, dtype=compute)
    if aggregate and settings.kind == "outcome":
        raise ConfigError(f"reward_model: {path} scores whole answers; aggregate is for models that score steps")
    if aggregate and aggregate not in AGGREGATES:
        raise ConfigError(f"reward_model: aggregate is {aggregate!r}; it must be one of {', '.join(AGGREGATES)}")
    if batch_tokens < 1:
        raise ConfigError(f"reward_model: batch_tokens is {batch_tokens}; it must be at least 1")
    own = load_tokenizer(folder)
    model.keep_tokens(token_count(own), folder)
    if not retokenize and not _same_vocabulary(own, tokenizer):
        raise ModelError(
            f"the reward model {path} and the policy {policy_folder} have different tokenizers; "
            "add retokenize=true to its spec, and it reads the text through its own chat template"
        )
    model.to(device).requires_grad_(False)
    return RewardModel(
        model,
        head.to(device),
        settings if not aggregate else RewardSettings("process", aggregate),  # type: ignore[arg-type]
        tokenizer=own,
        retokenize=retokenize,
        batch_tokens=batch_tokens,
    )


def _same_vocabulary(one: Any, other: Any) -> bool:
    return hasattr(other, "get_vocab") and one.get_vocab() == other.get_vocab()


class RewardModel:
    """Judges rollouts by a network with a scalar head."""

    def __init__(
        self,
        model: CausalModel,
        head: ScalarHead,
        settings: RewardSettings,
        *,
        tokenizer: Any,
        retokenize: bool = False,
        batch_tokens: int = 8192,
    ) -> None:
        self.model, self.head, self.settings = model, head, settings
        self.tokenizer, self.retokenize, self.batch_tokens = tokenizer, retokenize, batch_tokens

    def rewards(self, groups: Sequence[RolloutGroup]) -> list[Reward]:
        """The score of every rollout; one longer than the network's context, or without a step, is an error."""
        read = [self._example(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        rewards = [Reward(value=None, error=one) if isinstance(one, str) else None for one in read]
        places = [i for i, one in enumerate(read) if isinstance(one, Example)]
        examples = [one for one in read if isinstance(one, Example)]
        judged = self.scores(examples)
        for place, example, values in zip(places, examples, judged, strict=True):
            rewards[place] = self._reward(example, values)
        return [reward for reward in rewards if reward is not None]

    def scores(self, examples: Sequence[Example]) -> list[list[float]]:
        """What the head says after every completion token of each sequence (outcome: after the last one only)."""
        found: dict[int, list[float]] = {}
        for part in split_by_tokens([len(e.tokens) for e in examples], self.batch_tokens):
            batch = collate([examples[i] for i in part], share_prompts=True, device=self.model.device)
            out = score(self.model, [batch], logp=False, head=self.head)
            assert out.values_N is not None
            assert out.final_B is not None
            if self.settings.kind == "outcome":
                found |= {i: [value] for i, value in zip(part, out.final_B.tolist(), strict=True)}
                continue
            after = after_tokens(out.values_N, out.final_B, batch).cpu()
            pieces = after.split([sum(examples[i].mask) for i in part])
            found |= {i: piece.tolist() for i, piece in zip(part, pieces, strict=True)}
        return [found[i] for i in range(len(examples))]

    def _example(self, prompt: Prompt, rollout: Rollout) -> Example | str:
        """The tokens to read: those sampled, or the text's in the reward model's own template; or why not."""
        if self.retokenize:
            try:
                asked = prompt.text if prompt.text is not None else prompt.messages
                example = answer(self.tokenizer, asked, rollout.text, max_length=None)
            except DataError as error:
                return str(error)
        elif not rollout.tokens:
            return "an empty completion has no last token"
        else:
            mask = [False] * len(rollout.prompt_tokens) + [True] * len(rollout.tokens)
            example = Example([*rollout.prompt_tokens, *rollout.tokens], mask)
        longest = self.model.spec.max_positions
        if len(example.tokens) > longest:
            return f"{len(example.tokens)} tokens are more than the reward model's context of {longest}"
        return example

    def _reward(self, example: Example, values: list[float]) -> Reward:
        if self.settings.kind == "outcome":
            return Reward(value=values[0])
        first = example.mask.index(True)
        ends = step_ends(example.tokens[first:], self.tokenizer)
        if not ends:
            return Reward(value=None, error="the completion has no step: it is empty or white space")
        steps = [(end, float(torch.tensor(values[end]).sigmoid())) for end in ends]
        value = AGGREGATES[self.settings.aggregate]([p for _, p in steps])
        # places in another tokenizer's tokens say nothing about the rollout's
        return Reward(value=value, steps=[] if self.retokenize else steps)
