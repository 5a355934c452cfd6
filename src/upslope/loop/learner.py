"""What the learners that train a policy share: the order of their items, the update, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, make_optimizer
from upslope.data.batching import PromptStream, collate, split_by_tokens
from upslope.engine.engine import Engine
from upslope.functional.supervised_losses import nll
from upslope.loop.steps import in_steps
from upslope.runs.folder import Run
from upslope.training.optim import Group
from upslope.training.schedule import rate_at
from upslope.training.step import Loss, Outputs, update
from upslope.types import Batch, Example

__all__ = ["PolicyLearner", "likelihood", "weighted"]


class PolicyLearner:
    """A policy, its optimizer, and `count` items that are met in the order of the seed.

    A recipe adds `step`, `evaluate` and `trained_on`, and an engine where it samples.
    """

    options: Any
    engine: Engine | None = None

    def __init__(self, options: Any, policy: Policy, count: int, *, extra: Sequence[Group] = ()) -> None:
        self.options, self.policy = in_steps(options, count), policy
        self.run: Run | None = None
        self.order = PromptStream(count, seed=options.seed)
        self.optimizer = make_optimizer(policy, options, list(extra))

    def learning_rate(self, step: int) -> float:
        """The schedule at this step."""
        return rate_at(self.options, step)

    def update(self, step: int, batches: Iterable[Batch], loss: Loss, **passes: Any) -> dict[str, float]:
        """One optimizer step of the policy in training mode; `passes` are those of `training.step.update`."""
        self.policy.model.train()
        rates = {"learning_rate": self.learning_rate(step), "max_grad_norm": self.options.max_grad_norm}
        return update(self.policy.model, self.optimizer, batches, loss, step=step, **rates, **passes)

    def updated(self) -> None:
        """The weights have moved: what the engine cached of the old ones is void."""
        assert self.engine is not None
        self.engine.set_version(self.engine.version + 1)

    def micro_batches(
        self, examples: Sequence[Example], *, feed_last: bool = False
    ) -> tuple[list[Batch], list[list[int]]]:
        """Packed micro-batches, and which examples each holds."""
        parts = split_by_tokens([len(e.tokens) for e in examples], self.options.micro_batch_tokens)
        device = self.policy.model.device
        return [collate([examples[i] for i in part], feed_last=feed_last, device=device) for part in parts], parts

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments; the weights are in the model folder."""
        return {"optimizer": self.optimizer.state()}

    def state(self) -> dict[str, Any]:
        """The data position, and the weight version where there is an engine."""
        version = {} if self.engine is None else {"version": self.engine.version}
        return {"order": self.order.state_dict(), **version}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.optimizer.load(self.trained_weights(model, tensors), tensors["optimizer"])
        self.order.load_state_dict(state["order"])
        if self.engine is not None:
            self.engine.set_version(state["version"])

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint."""
        return self.policy.read(model)

    def write_model(self, folder: Path) -> None:
        """The policy with its float32 masters; what else is trained has a place of its own in the checkpoint."""
        own = {name for name, _ in self.policy.model.named_parameters()}
        self.policy.write(folder, {name: x for name, x in self.optimizer.weights().items() if name in own})


def weighted(examples: Sequence[Example], weight: float) -> list[Example]:
    """The examples with this weight in the loss of each of their trained tokens."""
    return [Example(e.tokens, e.mask, {"weight": torch.full((sum(e.mask),), weight)}) for e in examples]


def likelihood(out: Outputs, label_smoothing: float) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Negative log-likelihood of each trained token; with smoothing the plain one is logged beside it."""
    assert out.logp_N is not None
    if label_smoothing:
        return nll(out.logp_N, label_smoothing, out.mean_logp_N), {"loss/nll": -out.logp_N}
    return nll(out.logp_N), {}
