"""The reference model that a policy is held to, and the weight of the KL divergence to it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upslope.build import Policy, load_reference
from upslope.functional.kl import AdaptiveKL, k1
from upslope.options import RunOptions
from upslope.training.experience import Experience
from upslope.training.step import Forward, score


class Reference:
    """The start model, as a frozen copy or as the policy without its adapters; with coef 0 it is not loaded.

    coef: the weight of the KL in this step; with a `target` it adapts from step to step (arXiv 1909.08593).
    """

    def __init__(
        self, options: RunOptions, policy: Policy, coef: float, target: float | None = None, horizon: int = 10000
    ) -> None:
        self.options, self.policy, self.coef = options, policy, coef
        self.model = load_reference(policy, options) if coef else None
        self.controller = AdaptiveKL(coef, target, horizon) if target else None

    def score(self, x: Experience, temperature: float) -> dict[str, float]:
        """Fill in ref_logprobs; the KL of the step per completion (k1), which also moves the next step's weight."""
        policy, budget = self.policy, self.options.micro_batch_tokens
        batches, order = x.batches(range(x.size), budget, device=policy.model.device)
        if self.model is not None:
            out = score(self.model, batches, Forward(temperature=temperature))
        else:
            with policy.as_reference() as model:
                out = score(model, batches, Forward(temperature=temperature))
        x.ref_logprobs = x.in_order(out, order).logp_N
        kl = float(x.sequence_sums(k1(x.old_logprobs, x.ref_logprobs)).mean())
        if self.controller:
            self.coef = self.controller.coef
            self.controller.update(kl, x.size)
        return {"objective/kl": kl}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Nothing: a resumed run has the same start model."""
        return {}

    def state(self) -> dict[str, Any]:
        """The controller's."""
        return {"kl": self.controller.state_dict() if self.controller else None}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self.controller and state.get("kl"):
            self.controller.load_state_dict(state["kl"])
