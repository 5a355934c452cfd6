"""One optimizer step of a policy, on examples or on a step's trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from upslope.build import Policy, make_optimizer
from upslope.loop.sampler import Sampler
from upslope.training.experience import Experience
from upslope.training.optim import Group
from upslope.training.schedule import rate_at
from upslope.training.step import Forward, Loss, gap_metrics, score, update
from upslope.types import Batch

__all__ = ["Updater"]


class Updater:
    """The optimizer of the policy (and of the further groups in `extra`) at the learning rate of the schedule."""

    def __init__(
        self,
        options: Any,
        policy: Policy,
        *,
        extra: Sequence[Group] = (),
        learning_rate: Callable[[int], float] | None = None,
    ) -> None:
        self.options, self.policy = options, policy
        self.optimizer = make_optimizer(policy, options, list(extra))
        self.learning_rate = learning_rate or (lambda step: rate_at(options, step))

    def update(
        self,
        step: int,
        batches: Iterable[Batch],
        loss: Loss,
        forward: Forward = Forward(),
        *,
        gap_to: str | None = None,
        share: float = 1.0,
    ) -> dict[str, float]:
        """One optimizer step of the policy in training mode, as `training.step.update`."""
        self.policy.model.train()
        return update(
            self.policy.model,
            self.optimizer,
            batches,
            loss,
            forward,
            learning_rate=self.learning_rate(step),
            max_grad_norm=self.options.max_grad_norm,
            step=step,
            gap_to=gap_to,
            share=share,
        )

    def update_on(
        self,
        x: Experience,
        members: Sequence[int],
        step: int,
        loss: Loss,
        forward: Forward,
        *,
        sampler: Sampler,
        first: bool,
        share: float = 1.0,
    ) -> dict[str, float]:
        """One optimizer step on these sequences, whose weights in the loss are set; nothing where nothing is asked.

        `first`: the weights are still those that sampled. Then the pass starts from the sampler's activations where
        they were kept, and the sampler's log-probs are compared with the trainer's where they are said to be equal.
        """
        batches, _ = x.batches(members, self.options.micro_batch_tokens, device=self.policy.model.device)
        taken = self.take_over(x, members, batches, step, sampler) if first else {}
        if not forward.logp and forward.head is None:
            return taken
        check = "policy_logprobs" if first and sampler.exact and forward.logp and not taken else None
        return taken | self.update(step, batches, loss, forward, gap_to=check, share=share)

    def take_over(
        self, x: Experience, members: Sequence[int], batches: Sequence[Batch], step: int, sampler: Sampler
    ) -> dict[str, float]:
        """Have the batches start from the sampler's activations; metrics, or none where there are none.

        What was taken over cannot show whether sampler and trainer agree: so one of the members, another one at each
        step, goes through the network again, and its log-probs are compared.
        """
        share = attached(sampler, batches)
        if not share:
            return {}
        o, model = self.options, self.policy.model
        (one,), _ = x.batches([members[step % len(members)]], o.micro_batch_tokens, device=model.device)
        logp_N = score(model, [one], Forward(temperature=o.temperature)).logp_N
        return {"rollout/replayed": share, **gap_metrics((one.fields["policy_logprobs"] - logp_N).abs())}


def attached(sampler: Sampler, batches: Sequence[Batch]) -> float:
    """Have micro-batches start from the activations that the sampler kept; the share of their tokens that do.

    Only while the weights are those that sampled.
    """
    if sampler.activations is None:
        return 0.0
    kept = sum(batch.tokens_T.shape[0] for batch in batches if sampler.activations.attach(batch))
    return kept / sum(batch.tokens_T.shape[0] for batch in batches)
