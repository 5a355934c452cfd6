"""`upslope seq2seq --dry-run`: the pairs really encoded, the network really made, a piece of the work really done."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from upslope.loop.plan import plan_of
from upslope.options.seq2seq import Seq2SeqOptions
from upslope.preview.dry_run import Prediction, probe, report, update_memory_gb, update_seconds
from upslope.preview.rows import statistics
from upslope.recipes.pair_learner import PairData, PairLearner, start_policy
from upslope.types import SamplingParams

__all__ = ["show_seq2seq"]


def show_seq2seq(options: Seq2SeqOptions) -> int:
    """Print what a seq2seq run would do."""
    data = PairData.of(options)
    with tempfile.TemporaryDirectory(prefix="upslope-seq2seq-") as folder:
        policy = start_policy(options, data, Path(folder))
        with closing(PairLearner(options, policy, data)) as learner:
            prediction = _predict(learner)
    print(statistics(learner.examples), file=sys.stderr)
    plan = plan_of(options, examples=learner.order.n)
    report(options, policy, learner.examples[0], plan, prediction, len(learner.held_out), learner.account)
    return 0


def _predict(learner: PairLearner) -> Prediction:
    """Memory and time from a probe on the run's own pairs; for minimum risk also from a few sampled targets."""
    o, policy, examples = learner.options, learner.policy, learner.examples
    cost = probe(policy, examples, head=None, budget=o.micro_batch_tokens)
    source = sum(len(e.tokens) - sum(e.mask) for e in examples) / len(examples)
    target = sum(sum(e.mask) for e in examples) / len(examples)
    copies, sampling = 1, 0.0
    if o.objective == "minimum_risk":
        copies = o.num_samples + o.include_reference
        prompts = [prompt for prompt, _ in learner.prompts[: min(8, o.batch_size)]]
        params = SamplingParams(max_tokens=o.max_completion_length, n=o.num_samples, seed=o.seed)
        started = time.perf_counter()
        groups = learner.decode(prompts, params)
        sampling = (time.perf_counter() - started) * (o.batch_size / len(prompts)) ** 0.75
        target = sum(len(r.tokens) for g in groups for r in g.rollouts) / (len(groups) * o.num_samples)
    tokens = o.batch_size * (source + copies * target)
    seconds = cost.train_seconds + (cost.forward_seconds if copies > 1 else 0.0)
    step = sampling + tokens * seconds + update_seconds(policy)
    memory = update_memory_gb(policy, cost, min(o.micro_batch_tokens, tokens))
    return Prediction(memory, step, step * o.max_steps)
