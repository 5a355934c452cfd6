"""What the trained policy is asked of a step's trajectories: scored before its first update, then updated on."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from upslope.build import Policy, make_optimizer
from upslope.functional.policy_losses import importance_weights
from upslope.loop.companions import Critic
from upslope.loop.sampler import Sampler
from upslope.options import RLOptions
from upslope.training.experience import Experience
from upslope.training.optim import Group, rate_at
from upslope.training.step import Forward, Loss, Outputs, gap_metrics, score, update
from upslope.types import Batch


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

        `first`: the step's first update. Then the pass starts from the sampler's activations where
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
        share = attach(sampler, batches)
        if not share:
            return {}
        o, model = self.options, self.policy.model
        (one,), _ = x.batches([members[step % len(members)]], o.micro_batch_tokens, device=model.device)
        logp_N = score(model, [one], Forward(temperature=o.temperature)).logp_N
        return {"rollout/replayed": share, **gap_metrics((one.fields["policy_logprobs"] - logp_N).abs())}


def attach(sampler: Sampler, batches: Sequence[Batch]) -> float:
    """Have micro-batches start from the activations that the sampler kept; the share of their tokens that do.

    Only while the weights are those that sampled.
    """
    if sampler.activations is None:
        return 0.0
    kept = sum(batch.tokens_T.shape[0] for batch in batches if sampler.activations.attach(batch))
    return kept / sum(batch.tokens_T.shape[0] for batch in batches)


def score_before_update(
    o: RLOptions, x: Experience, sampler: Sampler, critic: Critic | None = None, *, correct: bool = True
) -> dict[str, float]:
    """Fill in old_logprobs, a critic's values and bootstraps, and where the two policies differ their importance.

    One pass where the critic shares the trunk; none for log-probs that are known (`Sampler.exact`). `correct` = False:
    no importance weights, whatever the options say.
    """
    model, head = sampler.policy.model, critic.head if critic is not None else None
    cut = o.truncated == "bootstrap"
    batches, order = x.batches(range(x.size), o.micro_batch_tokens, feed_last=cut, device=model.device)
    attach(sampler, batches)
    found = Outputs()
    if head is not None or not sampler.exact:
        found = score(model, batches, Forward(temperature=o.temperature, logp=not sampler.exact, head=head))
    if critic is not None:
        found = Outputs(**vars(found), **vars(critic.score(batches)))
    found = x.in_order(found, order)
    if "values_N" in found:
        x.values = found.values_N
    if cut:
        cut_B = torch.tensor([r.finish_reason == "length" for r in x.rollouts])
        x.bootstrap_B = torch.where(cut_B, found.final_B, 0.0)
    metrics: dict[str, float] = {}
    x.old_logprobs = x.policy_logprobs
    if not sampler.exact:
        x.old_logprobs = found.logp_N
        metrics = gap_metrics((x.policy_logprobs - x.old_logprobs).abs())
    if correct:
        metrics |= _correct(o, x, exact=not metrics or metrics["rollout/max_logprob_diff"] == 0)
    return {**metrics, "objective/entropy": float(-x.old_logprobs.mean())}


def _correct(o: RLOptions, x: Experience, *, exact: bool) -> dict[str, float]:
    """Fill in the weights of the trainer's policy against the distribution that was sampled from, where asked for."""
    level = o.rollout_correction
    if level == "none" or (level == "auto" and exact):
        return {}
    x.importance = x.unpadded(
        importance_weights(
            x.padded(x.old_logprobs),
            x.padded(x.sampling_logprobs),
            x.mask_BT,
            level="token" if level == "auto" else level,
            high=o.rollout_correction_cap,
        )
    )
    return {"rollout/importance_mean": float(x.importance.mean())}
