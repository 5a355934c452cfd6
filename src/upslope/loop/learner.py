"""What recipes hold and are: a policy, its updater, an order of items, parts with a state; what a checkpoint holds."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from upslope.build import Policy, load_policy
from upslope.data.batching import PromptStream, collate, split_by_tokens
from upslope.engine.engine import Engine
from upslope.functional.supervised_losses import nll
from upslope.loop.fingerprint import prompt_row
from upslope.loop.kept import NO_DATA
from upslope.loop.sampler import Sampler
from upslope.loop.updater import Updater
from upslope.options import RLOptions
from upslope.rewards.judge import reward_metrics
from upslope.rollout import length_metrics
from upslope.runs.folder import Run
from upslope.training.checkpoint import Part
from upslope.training.experience import Experience
from upslope.training.optim import Group, MasterAdamW, in_steps
from upslope.training.step import Forward, Loss, Outputs
from upslope.training.stopping import Evaluation, StepResult
from upslope.types import Batch, Example, RolloutGroup


class Learner:
    """What every recipe is: options, an order of items, an optimizer, parts with a state of their own; and a run.

    A recipe adds `step`, `evaluate`, `trained_on`, and where its weights are read from and written to. order: the
    number of items, or the order of whoever takes them.
    """

    higher_is_better = True
    account = NO_DATA
    engine: Engine | None = None
    optimizer: MasterAdamW

    def __init__(self, options: Any, order: int | PromptStream, parts: Sequence[Part] = ()) -> None:
        self.order = PromptStream(order, seed=options.seed) if isinstance(order, int) else order
        self.options, self.parts = in_steps(options, self.order.n), list(parts)
        self.run: Run | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what the learner started: at the end of its `with`."""

    def reported(self, summary: dict[str, Any]) -> dict[str, Any]:
        """The summary of a run that has ended, with what the recipe adds to it."""
        return summary

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments and the parts' tensors; the weights are in the model folder."""
        return {"optimizer": self.optimizer.state()} | {k: x for part in self.parts for k, x in part.tensors().items()}

    def state(self) -> dict[str, Any]:
        """The data position, the weight version where there is an engine, the parts' states."""
        version = {} if self.engine is None else {"version": self.engine.version}
        parts = {k: x for part in self.parts for k, x in part.state().items()}
        return {"order": self.order.state_dict(), **version, **parts}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.optimizer.load(self.trained_weights(model, tensors), tensors["optimizer"])
        self.order.load_state_dict(state["order"])
        if self.engine is not None:
            self.engine.set_version(state["version"])
        for part in self.parts:
            part.load(tensors, state)

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} reads no weights")


class PolicyLearner(Learner):
    """A learner that trains a policy, with an engine where it samples; extra: further groups of its optimizer."""

    def __init__(
        self,
        options: Any,
        policy: Policy,
        order: int | PromptStream,
        *,
        extra: Sequence[Group] = (),
        parts: Sequence[Part] = (),
    ) -> None:
        super().__init__(options, order, parts)
        self.policy = policy
        self.updater = Updater(self.options, policy, extra=extra)
        self.optimizer = self.updater.optimizer

    @classmethod
    def of(cls, options: Any, policy: Policy | None = None) -> Self:
        """What a run with these options trains; a `policy` already loaded is trained in place."""
        return cls(options, policy or load_policy(options))

    def update(self, step: int, batches: Iterable[Batch], loss: Loss, forward: Forward = Forward()) -> dict[str, float]:
        """One optimizer step of the policy in training mode, as `training.step.update`."""
        return self.updater.update(step, batches, loss, forward)

    def imitate(self, step: int, examples: Sequence[Example], *, feed_last: bool = False) -> StepResult:
        """One update on the mean of `likelihood` over the trained tokens of these sequences."""
        started = time.perf_counter()
        trained, tokens = sum(sum(e.mask) for e in examples), sum(len(e.tokens) for e in examples)
        batches, _ = self.micro_batches(weighted(examples, 1 / trained), feed_last=feed_last)
        smoothed = getattr(self.options, "label_smoothing", 0.0) > 0
        metrics = self.update(step, batches, self.likelihood, Forward(mean_logp=smoothed))
        rate = tokens / (time.perf_counter() - started)
        return StepResult({**metrics, "num_tokens": trained, "tokens_per_second": rate}, trained)

    def likelihood(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Negative log-likelihood of each trained token; with label_smoothing the plain one is logged beside it."""
        share = getattr(self.options, "label_smoothing", 0.0)
        if share:
            return nll(out.logp_N, share, out.mean_logp_N), {"loss/nll": -out.logp_N}
        return nll(out.logp_N), {}

    def weights_moved(self) -> None:
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

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint; a critic's complete the model folder."""
        return {**self.policy.read(model), **tensors.get("critic", {})}

    def write_model(self, folder: Path) -> None:
        """The policy with its float32 masters; what else is trained has a place of its own in the checkpoint."""
        own = {name for name, _ in self.policy.model.named_parameters()}
        self.policy.write(folder, {name: x for name, x in self.optimizer.weights().items() if name in own})


class RolloutLearner(PolicyLearner):
    """A learner whose items are the judged trajectories of a sampler; greedy: as for `Sampler`."""

    options: Any
    engine: Engine

    def __init__(
        self,
        options: RLOptions,
        policy: Policy,
        *,
        extra: Sequence[Group] = (),
        parts: Sequence[Part] = (),
        greedy: bool = False,
    ) -> None:
        self.sampler = Sampler(options, policy, greedy=greedy)
        super().__init__(options, policy, self.sampler.order, extra=extra, parts=[self.sampler, *parts])
        self.task, self.account, self.engine = self.sampler.task, self.sampler.account, self.sampler.engine

    def finish(
        self, step: int, groups: Sequence[RolloutGroup], x: Experience, metrics: dict[str, float], started: float
    ) -> StepResult:
        """The end of a step: the engine has new weights, the rollouts are stored; what the step reports.

        started: when what follows sampling began, by time.perf_counter.
        """
        self.weights_moved()
        seconds = time.perf_counter() - started
        tokens = sum(len(r.prompt_tokens) + len(r.tokens) for r in x.rollouts)
        rate = tokens / (seconds + metrics["seconds/rollout"])
        if self.run is not None:
            self.run.record_rollouts(step + 1, groups, arrays=stored(groups, x))
        return StepResult({**metrics, "seconds/update": seconds, "tokens_per_second": rate}, x.num_trained)

    def evaluate(self, step: int) -> Evaluation | None:
        """Greedy accuracy (or the mean reward, where the task has no verdict) on held-out prompts."""
        return self.sampler.evaluate(step, self.run)

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        return self.policy.tokenizer, (prompt_row(prompt) for prompt in self.sampler.prompts)

    def close(self) -> None:
        """End the reward workers."""
        self.sampler.judge.close()


STORED = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")
"""The columns of an experience that are stored with a step's rollouts."""


def stored(groups: Sequence[RolloutGroup], x: Experience) -> dict[str, list[Any]]:
    """Each stored column, rollout by rollout; None for those that were left out of the update."""
    place = {id(r): i for i, r in enumerate(x.rollouts)}
    counts = torch.bincount(x.sequence_N, minlength=x.size).tolist()
    rollouts = [r for g in groups for r in g.rollouts]
    parts = {name: column.split(counts) for name, column in x.columns().items() if name in STORED}
    return {
        name: [some[place[id(r)]].tolist() if id(r) in place else None for r in rollouts]
        for name, some in parts.items()
    }


def rollout_metrics(groups: Sequence[RolloutGroup], x: Experience) -> dict[str, float]:
    """Rewards and their parts, lengths, and how much of the step is left out of the update."""
    rollouts = [r for g in groups for r in g.rollouts]
    left_out, trained = float(len(rollouts) - x.size), float(x.num_trained)
    return {**reward_metrics(groups), **length_metrics(rollouts), "rollout/left_out": left_out, "num_tokens": trained}


def means_of(made: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a step's updates, each averaged over the updates that have it, and how many there were."""
    names = dict.fromkeys(name for metrics in made for name in metrics)
    found = {name: [m[name] for m in made if name in m] for name in names}
    return {**{name: sum(x) / len(x) for name, x in found.items()}, "optimizer_steps": float(len(made))}


def weighted(examples: Sequence[Example], weight: float) -> list[Example]:
    """The examples with this weight in the loss of each of their trained tokens."""
    return [Example(e.tokens, e.mask, {"weight": torch.full((sum(e.mask),), weight)}) for e in examples]
