"""From judged rollouts to what a policy-gradient update eats: flat per-token numbers over packed sequences.

All numbers of a step live in flat tensors over its N trained tokens, sequence after sequence; the time axis of
returns and advantages is a padded view of them. Tokens that the environment put into a trajectory have no place in
the flat tensors, so returns pass over them as if they were not there.

Shapes: B sequences, T trained tokens of the longest, N trained tokens in all, P prompts, G completions per prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from upslope.data.batching import collate, data_order, flat_from_padded, padded_from_flat, split_by_tokens
from upslope.errors import DataError
from upslope.functional.masking import loss_weights
from upslope.functional.shaping import at_last_token, soft_overlong_penalty
from upslope.options import RLOptions
from upslope.training.step import Outputs
from upslope.types import Batch, Example, Rollout, RolloutGroup

Normalizer = Literal["token", "sequence", "constant"]

_MODES: dict[Normalizer, Any] = {"token": "token_mean", "sequence": "sequence_mean_token_mean", "constant": "constant"}


COLUMNS = {
    "sampling_logprobs": "of the distribution that was sampled from, filters included",
    "policy_logprobs": "of the policy that sampled, at its temperature, as the sampler computed them",
    "old_logprobs": "of the trained policy before the step's first update, as the trainer computes them",
    "ref_logprobs": "of the reference model",
    "values": "what the critic says of the state in which each token was chosen, before the update",
    "advantages": "what the update weighs each token's likelihood with",
    "returns": "what the critic is to say",
    "importance": "weight of the old policy against the distribution that was sampled from",
    "slope": "the gradient of a sequence's expected cost in its own log-prob (minimum risk)",
    "weight": "each token's share of the one loss of the step (training/step.py)",
}
"""Everything that is known of the N trained tokens of a step, each [N]: the fields of its micro-batches."""


class Experience:
    """The B trajectories of one step that are trained on, and the columns over their N tokens.

    `rollouts` keeps (prompt, sample) order; `group_B` says which prompt each belongs to. `sampling_logprobs` and
    `policy_logprobs` are there from the start; reading a column of COLUMNS before it is set is an AttributeError.
    bootstrap_B: the value of the state after a completion that was cut by its budget, else 0; None where every end is
    an end.
    """

    bootstrap_B: Tensor | None = None

    sampling_logprobs: Tensor
    policy_logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor
    slope: Tensor
    weight: Tensor

    def __init__(self, rollouts: list[Rollout], group_B: list[int]) -> None:
        counts = torch.tensor([sum(r.mask) for r in rollouts])
        self.rollouts, self.group_B = rollouts, group_B
        self.sequence_N = torch.repeat_interleave(torch.arange(len(rollouts)), counts)
        for name in ("sampling_logprobs", "policy_logprobs"):
            of_tokens = (zip(getattr(r, name), r.mask, strict=True) for r in rollouts)
            setattr(self, name, torch.tensor([p for some in of_tokens for p, real in some if real]))

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], *, drop_truncated: bool = False) -> Experience:
        """Take every rollout that is `trainable`.

        Raises DataError when nothing is left.
        """
        kept = [
            (rollout, g)
            for g, group in enumerate(groups)
            for rollout in group.rollouts
            if trainable(rollout, drop_truncated=drop_truncated)
        ]
        if not kept:
            errors = {r.reward.error for group in groups for r in group.rollouts if r.reward.error}
            why = f"every reward failed, first: {sorted(errors)[0]}" if errors else "every completion was cut off"
            raise DataError(f"no completion of this step can be trained on: {why}")
        return cls([rollout for rollout, _ in kept], [g for _, g in kept])

    def columns(self) -> dict[str, Tensor]:
        """The columns that are set, by name."""
        return {name: x for name, x in vars(self).items() if name in COLUMNS}

    @property
    def size(self) -> int:
        """B."""
        return len(self.rollouts)

    @property
    def num_trained(self) -> int:
        """N."""
        return int(self.sequence_N.shape[0])

    def padded(self, x_N: Tensor) -> Tensor:
        """[N] -> [B, T], 0 where a sequence has ended."""
        return padded_from_flat(x_N, self.sequence_N, self.size)[0]

    @property
    def mask_BT(self) -> Tensor:
        """True where `padded` holds a token."""
        return padded_from_flat(self.policy_logprobs, self.sequence_N, self.size)[1]

    def unpadded(self, x_BT: Tensor) -> Tensor:
        """[B, T] -> [N], the inverse of `padded`."""
        return flat_from_padded(x_BT, self.mask_BT)

    def per_sequence(self, x_B: Tensor) -> Tensor:
        """[B] -> [N]: the same number for every token of a sequence."""
        return x_B[self.sequence_N]

    def sequence_sums(self, x_N: Tensor) -> Tensor:
        """[N] -> [B]."""
        return torch.zeros(self.size, dtype=x_N.dtype).index_add_(0, self.sequence_N, x_N)

    def set_weights(self, members: Sequence[int], normalizer: Normalizer, *, constant: int | None = None) -> None:
        """Give every token of `members` its share of their one loss, in `weight` (see training/step.py).

        constant: what the normalizer of that name divides each sequence by.
        """
        member_B = torch.zeros(self.size, dtype=torch.bool)
        member_B[list(members)] = True
        divisor = float(constant) if normalizer == "constant" and constant is not None else None
        members_BT = self.mask_BT & member_B[:, None]
        weights_BT, denominator = loss_weights(members_BT, _MODES[normalizer], constant=divisor)
        self.weight = weights_BT[self.mask_BT] / denominator

    def minibatches(self, parts: int, *, seed: int, epoch: int) -> list[list[int]]:
        """Every sequence once, in `parts` shuffled sets whose numbers of prompts differ by at most one.

        A prompt's completions stay in one set. A pure function of (seed, epoch); fewer sets where there are fewer
        prompts.
        """
        groups = sorted(set(self.group_B))
        order = [groups[i] for i in data_order(len(groups), seed=seed, epoch=epoch)]
        parts = min(parts, len(order))
        edges = [i * len(order) // parts for i in range(parts + 1)]
        sets = [set(order[a:b]) for a, b in itertools.pairwise(edges)]
        return [[i for i, g in enumerate(self.group_B) if g in chosen] for chosen in sets]

    def batches(
        self, members: Sequence[int], token_budget: int, *, feed_last: bool = False, device: torch.device | str = "cpu"
    ) -> tuple[list[Batch], list[int]]:
        """The sequences `members` as packed micro-batches of at most `token_budget` tokens, with all columns.

        `feed_last` is needed for the value of the state after the last token.

        The completions of one prompt stay together and share its tokens. Also returns the sequences in the order in
        which the micro-batches hold them.
        """
        ends = torch.bincount(self.sequence_N, minlength=self.size).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        groups: dict[int, list[int]] = {}
        for i in members:
            groups.setdefault(self.group_B[i], []).append(i)
        packs = list(groups.values())
        sizes = [
            len(self.rollouts[pack[0]].prompt_tokens) + sum(len(self.rollouts[i].tokens) for i in pack)
            for pack in packs
        ]
        parts = [[i for p in part for i in packs[p]] for part in split_by_tokens(sizes, token_budget)]
        columns = self.columns()

        def example(i: int) -> Example:
            r = self.rollouts[i]
            fields = {name: x_N[starts[i] : ends[i]] for name, x_N in columns.items()}
            return Example([*r.prompt_tokens, *r.tokens], [False] * len(r.prompt_tokens) + r.mask, fields)

        batches = [
            collate([example(i) for i in part], share_prompts=True, feed_last=feed_last, device=device)
            for part in parts
        ]
        return batches, [i for part in parts for i in part]

    def in_order(self, outputs: Outputs, order: Sequence[int]) -> Outputs:
        """Outputs of batches that hold the sequences in `order`, brought back into this experience's order."""
        counts = torch.bincount(self.sequence_N, minlength=self.size)
        starts = counts.cumsum(0) - counts
        tokens = torch.cat([torch.arange(int(starts[i]), int(starts[i] + counts[i])) for i in order])
        place_N, place_B = torch.argsort(tokens), torch.argsort(torch.tensor(list(order)))
        return Outputs(
            **{name: x.cpu()[place_B if name.endswith("_B") else place_N] for name, x in vars(outputs).items()}
        )


def trainable(rollout: Rollout, *, drop_truncated: bool = False) -> bool:
    """Whether it was judged and has a token to train on; optionally only where it was not truncated."""
    usable = rollout.reward.value is not None and any(rollout.mask)
    return usable and not (drop_truncated and rollout.finish_reason == "length")


def shaped_rewards(x: Experience, o: RLOptions) -> tuple[Tensor, dict[str, float]]:
    """The reward of each sequence [B] after the penalties that do not depend on the policy, and their means."""
    rewards = torch.tensor([float(r.reward.value or 0.0) for r in x.rollouts])
    metrics: dict[str, float] = {}
    if o.missing_eos_penalty:
        cut = torch.tensor([float(r.finish_reason == "length") for r in x.rollouts])
        rewards = rewards - o.missing_eos_penalty * cut
        metrics["rewards/missing_eos"] = float(-o.missing_eos_penalty * cut.mean())
    if o.overlong_buffer:
        lengths = torch.tensor([len(r.tokens) for r in x.rollouts])
        penalty = soft_overlong_penalty(lengths, o.max_completion_length, o.overlong_buffer).float()
        rewards = rewards + penalty
        metrics["rewards/overlong"] = float(penalty.mean())
    return rewards, metrics


def token_rewards(experience: Experience, scores_B: Tensor) -> Tensor:
    """Sequence scores [B] as rewards along the trained tokens [B, T], with the process rewards at their places.

    A step (index, value) of `Reward.steps` lands on token `index` of the rollout; where the environment put that
    token, on the last sampled one before it. What the steps do not account for of the score lands on the last sampled
    token, so that a row's sum is the score. Raises DataError for an index outside the rollout.
    """
    mask_BT = experience.mask_BT
    steps_BT = torch.zeros(mask_BT.shape)
    for row, rollout in enumerate(experience.rollouts):
        for index, value in rollout.reward.steps:
            if not 0 <= index < len(rollout.tokens):
                raise DataError(
                    f"a step reward names token {index} of a completion of {len(rollout.tokens)} tokens "
                    f"(sample {rollout.sample}): indices count the completion's tokens from 0"
                )
            steps_BT[row, max(0, sum(rollout.mask[: index + 1]) - 1)] += value
    return steps_BT + at_last_token(scores_B - steps_BT.sum(1), mask_BT)


def group_rewards(experience: Experience, rewards_B: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence rewards [B] as (rewards_PG, mask_PG, place_B): rewards_PG.flatten()[place_B] is rewards_B again."""
    counts = [experience.group_B.count(g) for g in range(num_groups)]
    width = max(counts)
    seen = [0] * num_groups
    place = []
    for g in experience.group_B:
        place.append(g * width + seen[g])
        seen[g] += 1
    place_B = torch.tensor(place)
    rewards = torch.zeros(num_groups * width)
    mask = torch.zeros(num_groups * width, dtype=torch.bool)
    rewards[place_B], mask[place_B] = rewards_B, True
    return rewards.view(num_groups, width), mask.view(num_groups, width), place_B
