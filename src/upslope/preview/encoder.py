"""What an encoder's run says before it starts (--dry-run) and after it ends: the best checkpoint on dev and test."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from upslope.loop.encoder import LabelLearner
from upslope.loop.plan import plan_of
from upslope.loop.session import resident_memory_gb
from upslope.models.encoder.items import Input, groups_of, item_logits, padded_batch
from upslope.options.encoder import EncoderOptions
from upslope.preview.dry_run import Prediction, counting_kept
from upslope.preview.rows import mask_view, statistics
from upslope.types import Example

__all__ = ["show"]


def show(options: EncoderOptions, learner: LabelLearner) -> int:
    """Print what a run would do: data, one example, the arithmetic, predicted memory and time."""
    inputs = [x for row in learner.rows for x in row]
    prediction = _predict(options, learner, inputs)
    plan = plan_of(options, examples=len(learner.rows))
    encoder, account = learner.encoder, learner.account
    parameters = sum(p.numel() for p in encoder.parameters())
    if options.json:
        said = {"data": account.facts(), "prediction": asdict(prediction), "plan": asdict(plan)}
        print(json.dumps({**said, "parameters": parameters}))
        return 0
    from rich.console import Console

    console = Console()
    examples = [_example(x) for x in inputs]
    print(statistics(examples), file=sys.stderr)
    console.print(mask_view(examples[0], learner.tokenizer))
    console.print(f"labels of these items: {' '.join(map(learner.name_of, inputs[0].targets))}", markup=False)
    for line in [*(f"{name}: {value}" for name, value in account.facts().items()), *account.lines()]:
        console.print(line, markup=False, soft_wrap=True)
    dtype = str(encoder.dtype).removeprefix("torch.")
    console.print(f"model: {encoder.config.model_type}, {parameters:,} parameters, {dtype}")
    for line in plan.words:
        console.print(f"- {line}")
    console.print(
        f"- Predicted: {prediction.memory_gb:.1f} GB at the peak, {prediction.step_seconds:.2f} s per step, "
        f"{prediction.run_seconds / 60:.1f} min without evaluation."
    )
    return 0


def _example(x: Input) -> Example:
    """For the view: the tokens that carry a label are the trained ones (the first where the text carries it)."""
    carrying = set(x.places or [0])
    return Example(x.tokens, [i in carrying for i in range(len(x.tokens))])


def _predict(options: EncoderOptions, learner: LabelLearner, inputs: Sequence[Input]) -> Prediction:
    """Extrapolate from one micro-batch of real inputs."""
    encoder = learner.encoder
    group = groups_of([len(x.tokens) for x in inputs[:64]], min(options.micro_batch_tokens, 2048))[0]
    batch = padded_batch([inputs[i] for i in group], encoder, *learner.pads)
    tokens = batch.ids_BT.numel()
    times, activations = [], 0
    encoder.train()
    for _ in range(2):
        started = time.perf_counter()
        with counting_kept(encoder) as kept:
            loss = item_logits(encoder, batch).logsumexp(-1).sum()
        activations = sum(kept.values())
        loss.backward()
        times.append(time.perf_counter() - started)
        learner.optimizer.zero_grad()
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    mean = sum(len(x.tokens) for x in inputs) / len(learner.rows)
    per_step = mean * options.batch_size
    seconds = min(times) / tokens * per_step
    micro = min(options.micro_batch_tokens, per_step)
    memory = resident_memory_gb() + (trained * 12 + activations / tokens * micro) / 1e9
    return Prediction(memory, seconds, seconds * plan_of(options, examples=len(learner.rows)).optimizer_steps)
