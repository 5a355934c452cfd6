"""One small step really made, and what it says of the whole run's memory and time.

What autograd keeps and gives back marks the parts of a step: before the first tensor is kept it samples, judges and
scores; from there to the last one given back are the passes; the rest is the optimizer's.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from upslope.loop.sampler import room_for_activations
from upslope.loop.session import peak_memory_gb, resident_memory_gb
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.decoder.fast import bytes_per_token
from upslope.options import DPOOptions, ExpertOptions, RLOptions, RunOptions
from upslope.preview.plan import Plan, plan_of
from upslope.recipes.dpo import REFERENCED
from upslope.training.step import Unit
from upslope.types import Example


@dataclass(frozen=True, slots=True)
class Prediction:
    """Peak memory of the process (1e9 bytes), seconds of one training step, and of the whole run without evaluation."""

    memory_gb: float
    step_seconds: float
    run_seconds: float


@dataclass(slots=True)
class _Watch:
    """Seconds of a step's parts, and of each forward pass the storages it kept: by address a reference and bytes."""

    mark: float = field(default_factory=time.perf_counter)
    before: float = 0.0
    passes: float = 0.0
    update: float = 0.0
    given: bool = True
    kept: list[dict[int, tuple[StorageWeakRef, int]]] = field(default_factory=list)

    def lap(self) -> float:
        """Seconds since the last event."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        last, self.mark = self.mark, time.perf_counter()
        return self.mark - last

    def keep(self, x: Tensor) -> Tensor:
        """A tensor is kept for a backward pass."""
        if not self.given:
            self.passes += self.lap()
        elif self.kept:
            self.update += self.lap()
        else:
            self.before = self.lap()
        if self.given:
            self.kept.append({})
        storage, self.given = x.untyped_storage(), False
        self.kept[-1][storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return x

    def give(self, x: Tensor) -> Tensor:
        """The backward pass takes it."""
        self.passes, self.given = self.passes + self.lap(), True
        return x

    @property
    def activation_bytes(self) -> int:
        """The most that a pass kept and that is gone after the step: weights stay."""
        return max(sum(n for storage, n in kept.values() if storage.expired()) for kept in self.kept)


@dataclass(frozen=True)
class Trial:
    """A run's options, those of a `little` one, its learner, and the rows it trains on, each with its sequences.

    The rows of a learner that samples are prompts.
    """

    options: Any
    little: Any
    learner: Any
    items: Sequence[Sequence[Example]]

    def plan(self, options: RunOptions) -> Plan:
        """The plan of either options."""
        return plan_of(options, examples=self.learner.order.n)

    def predict(self) -> Prediction:
        """Memory and time of the run from a step of the little one."""
        o, (number, watch, metrics) = self.options, self._watched()
        plan, done = self.plan(o), self.plan(self.little)
        tokens, done_tokens = self._tokens(number, metrics)
        scale = tokens / done_tokens
        # completions without advantage were left out of the small step's update, and need not be of another one's
        kept = 1 - metrics.get("rollout/skipped", 0.0)
        passes = watch.passes * scale / kept * plan.passes_per_sequence / done.passes_per_sequence
        # the first update starts from what sampling computed: two thirds of the work; the others cannot
        replayed = metrics.get("rollout/replayed", 0.0)
        passes *= (3 - replayed / plan.optimizer_steps_per_step) / (3 - replayed)
        rollout, reward = (metrics.get(f"seconds/{name}", 0.0) for name in ("rollout", "reward"))
        scoring = max(0.0, watch.before - rollout - reward)
        more = plan.new_tokens_per_step / max(1, done.new_tokens_per_step)
        # Decoding more rows costs less than in proportion: the weights are read once per token whatever the batch.
        sampling = rollout * more**0.75 + reward * more
        if isinstance(o, ExpertOptions):  # a round's, spread over its steps
            before = (sampling + scoring * more) / o.train_steps
        else:
            batches = 1 if number else 1 + getattr(self.little, "rollout_lag", 0)
            before = sampling / batches + scoring * scale
        step = before + passes + watch.update * plan.optimizer_steps_per_step
        steps = plan.optimizer_steps / plan.optimizer_steps_per_step
        run = step * steps
        if isinstance(o, DPOOptions) and o.loss in REFERENCED:  # every row that is met is read once beforehand
            run += passes / 3 * min(steps, len(self.items) / o.batch_size)
        micro = [min(o.micro_batch_tokens, count) for count in (tokens, done_tokens)]
        grown = watch.activation_bytes * (micro[0] / micro[1] / kept - 1)
        if plan.new_tokens_per_step:  # the engine sleeps while the weights are trained: the larger of the two counts
            grown = max(grown, self._cache_bytes(plan) - self._cache_bytes(done))
        grown += self._taken_over(tokens) - self._taken_over(done_tokens)
        # freed memory is kept (devices.hardware.keep_freed_memory): what is resident now is the step's peak
        return Prediction(max(peak_memory_gb(), resident_memory_gb() + grown / 1e9), step, run)

    def _watched(self) -> tuple[int, _Watch, Mapping[str, float]]:
        """A step's number, parts and metrics: the second's where a first one is so short that its beginnings count."""
        for number in range(2):
            watch = _Watch()
            with saved_tensors_hooks(watch.keep, watch.give):
                metrics = self.learner.step(number).metrics
            watch.update += watch.lap()
            if watch.before + watch.passes + watch.update > 1:
                break
        return number, watch, metrics

    def _tokens(self, number: int, metrics: Mapping[str, float]) -> tuple[float, float]:
        """Tokens that a step of the run computes, and those that the little run's step of this number did."""
        o, order, size = self.options, self.learner.order, getattr(self.little, "batch_size", 0)
        if size and not self.plan(o).new_tokens_per_step:
            sizes = [Unit(tuple(item)).tokens for item in self.items]
            met = range(number * size, (number + 1) * size)
            drawn = [sizes[order.at(i) if len(sizes) == order.n else i % len(sizes)] for i in met]
            return o.batch_size * sum(sizes) / len(sizes), sum(drawn)
        masks = [flag for item in self.items for e in item for flag in e.mask]
        given, every = (count / len(self.items) for count in (sum(masks), len(masks)))
        completion = metrics.get("completions/mean_length", given or o.max_completion_length)
        shared = isinstance(o, RLOptions) and not isinstance(o, ExpertOptions)

        def tokens(options: Any) -> float:
            # A prompt's tokens are computed once for all its completions.
            sequences = self.plan(options).sequences_per_step
            return sequences * completion + (options.num_prompts if shared else sequences) * (every - given)

        return tokens(o), tokens(self.little)

    @property
    def _longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(e.tokens) - sum(e.mask) for item in self.items for e in item)

    def _cache_bytes(self, plan: Plan) -> float:
        """What the engine's cache takes while a step's (or a round's) sequences are sampled."""
        model, length = self.learner.policy.model, self.options.max_completion_length
        blocks = min(plan.new_tokens_per_step // length, 256) * math.ceil((self._longest + length + 1) / BLOCK)
        return min(blocks * KVCache.bytes_per_block(model.spec, model.dtype), 1e9)

    def _taken_over(self, tokens: float) -> float:
        """Bytes of so many tokens' activations that the run's sampler keeps for the update."""
        if getattr(getattr(self.learner, "sampler", None), "activations", None) is None:
            return 0.0
        room = room_for_activations(self.options, self.learner.policy, self._longest)
        each = bytes_per_token(self.learner.sampler.activations.decoder.config, self.learner.policy.model.dtype)
        return min(room.capacity, tokens) * each if room is not None else 0.0
