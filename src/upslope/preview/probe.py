"""One small step really made, and what it says of the whole run's memory and time.

What autograd keeps and gives back marks the parts of a step: before the first tensor is kept it samples, judges and
scores; from there to the last one given back are the passes; the rest is the optimizer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from upslope.loop.sampler import room_for_activations
from upslope.loop.session import peak_memory_gb, resident_memory_gb
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.decoder.activations import bytes_per_token
from upslope.options import DPOOptions, ExpertOptions, RLOptions, RunOptions
from upslope.preview.plan import Plan, plan_of
from upslope.recipes.dpo import REFERENCED
from upslope.training.units import Unit
from upslope.types import Example

__all__ = ["Prediction", "predict"]


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


def predict(options: RunOptions, little: Any, learner: Any, items: Sequence[Sequence[Example]]) -> Prediction:
    """Memory and time of a run from the first step of its learner, which was made with the options of a `little` one.

    items: rows to train on, each with its sequences, or prompts.
    """
    watch = _Watch()
    with saved_tensors_hooks(watch.keep, watch.give):
        metrics = learner.step(0).metrics
    watch.update += watch.lap()
    plan, done = plan_of(options, examples=learner.order.n), plan_of(little, examples=learner.order.n)
    tokens, done_tokens = _tokens(options, little, learner, items, metrics)
    scale = tokens / done_tokens
    # completions without advantage were left out of the small step's update, and need not be of another one's
    trained = scale / (1 - metrics.get("rollout/skipped", 0.0))
    passes = watch.passes * trained * plan.passes_per_sequence / done.passes_per_sequence
    # the first update starts from what sampling computed: two thirds of the work; the others cannot
    replayed = metrics.get("rollout/replayed", 0.0)
    passes *= (3 - replayed / plan.optimizer_steps_per_step) / (3 - replayed)
    rollout, reward = (metrics.get(f"seconds/{name}", 0.0) for name in ("rollout", "reward"))
    scoring = max(0.0, watch.before - rollout - reward)
    more = plan.new_tokens_per_step / max(1, done.new_tokens_per_step)
    # Decoding more rows costs less than in proportion: the weights are read once per token whatever the batch.
    sampling = (rollout * more**0.75 + reward * more) / (1 + getattr(little, "rollout_lag", 0))
    if isinstance(options, ExpertOptions):
        sampling /= options.train_steps  # a round's, spread over its steps
    step = sampling + scoring * scale + passes + watch.update * plan.optimizer_steps_per_step
    steps = plan.optimizer_steps / plan.optimizer_steps_per_step
    run = step * steps
    if isinstance(options, DPOOptions) and options.loss in REFERENCED:  # every row that is met is read once beforehand
        run += passes / 3 * min(steps, len(items) / options.batch_size)
    micro, little_micro = (min(options.micro_batch_tokens, count) for count in (tokens, done_tokens))
    update = watch.activation_bytes * (micro / little_micro * trained / scale - 1)
    grown = _kept_more(options, learner, items, tokens, done_tokens)
    if plan.new_tokens_per_step:  # the engine sleeps while the weights are trained: the larger of the two counts
        cache, little_cache = (_cache_bytes(o, p, learner, items) for o, p in ((options, plan), (little, done)))
        update = max(update, cache - little_cache)
    # freed memory is kept (devices.hardware.keep_freed_memory): what is resident now is the step's peak
    return Prediction(max(peak_memory_gb(), resident_memory_gb() + (update + grown) / 1e9), step, run)


def _tokens(
    options: Any, little: Any, learner: Any, items: Sequence[Sequence[Example]], metrics: Any
) -> tuple[float, float]:
    """Tokens that a step of the run computes, and those that the small one did."""
    if hasattr(options, "batch_size") and not plan_of(options).new_tokens_per_step:
        sizes = [Unit(tuple(item)).tokens for item in items]
        met = range(little.batch_size)
        drawn = [sizes[learner.order.at(i) if len(sizes) == learner.order.n else i % len(sizes)] for i in met]
        return options.batch_size * sum(sizes) / len(sizes), sum(drawn)
    prompt, given = (
        sum(sum(trained == flag for e in item for trained in e.mask) for item in items) / len(items)
        for flag in (False, True)
    )
    completion = metrics.get("completions/mean_length", given or options.max_completion_length)
    shared = isinstance(options, RLOptions) and not isinstance(options, ExpertOptions)
    both = []
    for o in (options, little):
        sequences = plan_of(o).sequences_per_step
        # A prompt's tokens are computed once for all its completions.
        both.append(sequences * completion + (o.num_prompts if shared else sequences) * prompt)
    return both[0], both[1]


def _longest(options: Any, items: Sequence[Sequence[Example]]) -> int:
    return max(len(e.tokens) - sum(e.mask) for item in items for e in item) + options.max_completion_length


def _cache_bytes(options: Any, plan: Plan, learner: Any, items: Sequence[Sequence[Example]]) -> float:
    """What the engine's cache takes while a step's (or a round's) sequences are sampled."""
    model = learner.policy.model
    sequences = plan.new_tokens_per_step // options.max_completion_length
    blocks = min(sequences, 256) * math.ceil((_longest(options, items) + 1) / BLOCK)
    return min(blocks * KVCache.bytes_per_block(model.spec, model.dtype), 1e9)


def _kept_more(
    options: Any, learner: Any, items: Sequence[Sequence[Example]], tokens: float, done_tokens: float
) -> float:
    """Bytes of the sampler's activations that are kept for the update, beyond those of the small step."""
    if getattr(getattr(learner, "sampler", None), "activations", None) is None:
        return 0.0
    longest = _longest(options, items) - options.max_completion_length
    room = room_for_activations(options, learner.policy, longest)
    capacity = 0 if room is None else room.capacity
    each = bytes_per_token(learner.sampler.activations.decoder.config, learner.policy.model.dtype)
    return max(0.0, min(capacity, tokens) - done_tokens) * each
