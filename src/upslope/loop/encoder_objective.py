"""The objectives of classify and tag, as a loss per labelled item. Shapes: N items, C labels, K samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upslope.engine.sampling import draw, uniforms
from upslope.functional.advantages import group_centered, leave_one_out
from upslope.functional.logprobs import log_softmax
from upslope.functional.policy_losses import reinforce
from upslope.functional.supervised_losses import classification_policy_gradient, nll

__all__ = ["Objective"]


@dataclass(frozen=True, slots=True)
class Objective:
    """Loss per item from logits. rewards_CC: r(right label, said label); squared_error has numbers for targets.

    A sampled label depends on (seed, step, row, item in the row, sample) and on nothing else.
    """

    kind: str
    rewards_CC: Tensor
    num_samples: int = 4
    baseline: str = "leave_one_out"
    label_smoothing: float = 0.0
    seed: int = 0

    def __call__(
        self, logits_NC: Tensor, targets_N: Tensor, *, step: int, rows_N: Sequence[int], counters_N: Sequence[int]
    ) -> Tensor:
        """[N, C], [N] -> loss per item [N], to be minimised."""
        if self.kind == "squared_error":
            return (logits_NC[:, 0] - targets_N).square()
        rewards_NC = self.rewards_CC.to(logits_NC.device)[targets_N]
        if self.kind == "policy_gradient":
            return classification_policy_gradient(logits_NC, rewards_NC)
        logp_NC = log_softmax(logits_NC)
        if self.kind == "cross_entropy":
            mean_N = logp_NC.mean(-1) if self.label_smoothing else None
            return nll(logp_NC.gather(1, targets_N[:, None])[:, 0], self.label_smoothing, mean_N)
        return self.of_samples(logp_NC, rewards_NC, self.samples(logp_NC, step, rows_N, counters_N))

    def samples(self, logp_NC: Tensor, step: int, rows_N: Sequence[int], counters_N: Sequence[int]) -> Tensor:
        """K labels per item drawn from the policy: [N, K]."""
        k = self.num_samples
        rows = [row for row in rows_N for _ in range(k)]
        counters = [counter * k + i for counter in counters_N for i in range(k)]
        uniform = torch.from_numpy(uniforms([self.seed] * len(rows), [step] * len(rows), rows, counters))
        spread = logp_NC.detach().repeat_interleave(k, dim=0)
        return draw(spread, uniform.to(spread.device)).view(-1, k)

    def of_samples(self, logp_NC: Tensor, rewards_NC: Tensor, labels_NK: Tensor) -> Tensor:
        """REINFORCE with these labels, averaged over an item's samples: [N]."""
        rewards_NK = rewards_NC.gather(1, labels_NK)
        if self.baseline == "mean":
            rewards_NK = group_centered(rewards_NK)
        elif self.baseline == "leave_one_out":
            rewards_NK = leave_one_out(rewards_NK)
        return reinforce(logp_NC.gather(1, labels_NK), rewards_NK.to(logp_NC.dtype)).mean(1)
