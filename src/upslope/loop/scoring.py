"""What the trained policy and its critic say of a step's trajectories before its first update."""

from __future__ import annotations

import torch

from upslope.functional.policy_losses import importance_weights
from upslope.loop.critic import Critic
from upslope.loop.sampler import Sampler
from upslope.loop.updater import attached
from upslope.options import RLOptions
from upslope.training.experience import Experience
from upslope.training.step import Forward, Outputs, gap_metrics, score

__all__ = ["score_before_update"]


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
    attached(sampler, batches)
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
