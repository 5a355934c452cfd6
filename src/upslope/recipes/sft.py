"""Supervised fine-tuning: maximum likelihood of the completion, given the prompt.

for each batch of sequences:
    logp_t = log pi(token_t | tokens before t)          at the trained tokens only
    loss   = -sum_t logp_t / N                           N trained tokens in the whole batch
             label_smoothing e: -(1 - e) logp_t - e mean_v log pi(v)        (1512.00567)
             dft: -sg(pi(token_t)) logp_t                                   (2508.05629)
    AdamW step on the float32 masters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from upslope.build import Policy
from upslope.evaluation.verdicts import evaluate
from upslope.functional.supervised_losses import dft
from upslope.loop.kept import DataAccount, per_token, shared_out, tell_task, within_context
from upslope.loop.learner import PolicyLearner
from upslope.loop.prompts import demonstrations, encoded, held_out_groups, held_out_of
from upslope.loop.session import Recipe
from upslope.options import SFTOptions
from upslope.tasks.base import Task, load_task, prompts_of
from upslope.training.step import Outputs, score
from upslope.training.stopping import Evaluation, StepResult
from upslope.types import Batch, Example


class SFT(PolicyLearner):
    """Maximum likelihood on examples, measured by held-out loss and, with a task, by greedy accuracy."""

    def __init__(self, options: SFTOptions, policy: Policy) -> None:
        self.task = load_task(options.task) if options.task else None
        self.higher_is_better = self.task is not None
        fitting = within_context(options, policy)
        self.train_examples, self.eval_examples, self.account = load_examples(fitting, policy.tokenizer, self.task)
        if self.task is not None:
            held_out, _ = held_out_of(self.task, policy, options.eval_samples, options.max_completion_length)
            self.account = self.account.and_held_out(held_out)
        super().__init__(options, policy, len(self.train_examples))

    def step(self, step: int) -> StepResult:
        """One batch, one update."""
        return self.imitate(step, [self.train_examples[i] for i in self.order.take(self.options.batch_size)])

    def likelihood(self, batch: Batch, out: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The likelihood, or that of dynamic fine-tuning."""
        if self.options.loss != "dft":
            return super().likelihood(batch, out)
        return dft(out.logp_N), {"loss/nll": -out.logp_N}

    def evaluate(self, step: int) -> Evaluation | None:
        """Held-out loss per token; with a task also greedy accuracy on its held-out problems."""
        metrics: dict[str, Any] = {}
        if self.eval_examples:
            batches, _ = self.micro_batches(self.eval_examples)
            out = score(self.policy.model, batches)
            metrics |= {"eval_loss": per_token(-out.logp_N, batches), "eval_rows": len(self.eval_examples)}
        if self.task is not None and self.options.eval_samples:
            groups = held_out_groups(
                self.policy, self.task, self.options.eval_samples, self.options.max_completion_length
            )
            if self.run is not None:
                self.run.record_rollouts(step, groups, split="eval")
            metrics["accuracy"] = evaluate(groups)
            return Evaluation("accuracy", metrics)
        return Evaluation("eval_loss", metrics) if metrics else None

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        return self.policy.tokenizer, ((e.tokens, e.mask) for e in self.train_examples)


def load_examples(
    options: SFTOptions, tokenizer: Any, task: Task | None
) -> tuple[list[Example], list[Example], DataAccount]:
    """Training and held-out examples, from a task's demonstrations or from files, and what became of every row."""
    o = options
    if task is not None:
        prompts = prompts_of(task, "train", o.num_examples, seed=o.seed)
        tell_task(task, o.eval_samples)
        shown = demonstrations(tokenizer, task, prompts, o.max_length)
        return [example for _, example in shown.rows], [], DataAccount({"train": shown.split})
    assert o.data is not None
    data = encoded(o.data, tokenizer, o.max_length, o.columns)
    if o.eval_data is not None:
        held_out = encoded(o.eval_data, tokenizer, o.max_length, o.columns)
        return shared_out(data, held_out, held=0, samples=o.eval_samples or None)
    # whatever eval_samples is: a resumed run may change that, not what it trains on
    return shared_out(data, None, held=len(data.rows) // 10, samples=o.eval_samples)


sft = Recipe("sft", SFT.of)
