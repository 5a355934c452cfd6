"""On-policy distillation: the teacher's distribution at every token the student writes (GKD, arXiv 2306.13649).

    for each step:
        a share on_policy_fraction of the prompts: sample y from the student (no gradient through sampling)
        the others: y is the data's completion
        s_t, t_t = next-token distributions of student and teacher, both at the temperature
        loss = sum_t D_t / N                              N trained tokens of the step
               forward  D = KL(teacher || student)        covers the teacher's modes; on the data alone: classic KD
               reverse  D = KL(student || teacher)        seeks them (MiniLLM, 2306.08543, its per-token part)
               jsd      D = w KL(teacher || M) + (1 - w) KL(student || M),  M = w teacher + (1 - w) student
        AdamW step

D is exact over the vocabulary, computed a few rows at a time. It sees the token at hand, not what a token does to
later ones: reverse KL per token is not MiniLLM's gradient of the KL between sequences.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, make_engine
from upslope.data.chat import load_tokenizer
from upslope.data.pieces import PairTokenizer
from upslope.errors import ModelError
from upslope.evaluation.verdicts import evaluate
from upslope.functional.distillation import linear_divergence
from upslope.loop.distill_items import Item, load_items, with_room
from upslope.loop.fingerprint import prompt_row
from upslope.loop.kept import per_token, within_context
from upslope.loop.learner import PolicyLearner, weighted
from upslope.loop.prompts import held_out_groups, held_out_of
from upslope.loop.session import Recipe
from upslope.models.attention.context import PackedContext
from upslope.models.files.loading import load_model
from upslope.models.files.sources import resolve
from upslope.models.protocol import CausalModel, evaluating
from upslope.options import DistillOptions
from upslope.rollout import length_metrics, sample
from upslope.runs.progress import told
from upslope.tasks.base import load_task
from upslope.training.step import Forward, Outputs
from upslope.training.stopping import Evaluation, StepResult
from upslope.types import Batch, Example, Reward, Rollout, RolloutGroup, SamplingParams


@told("loading the teacher")
def load_teacher(source: str, policy: Policy) -> CausalModel:
    """The frozen teacher in the student's compute dtype. ModelError: its vocabulary is another one."""
    folder = resolve(source)
    theirs, ours = _vocabulary(load_tokenizer(folder)), _vocabulary(policy.tokenizer)
    differ = next((token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)), None)
    if differ is not None:
        raise ModelError(
            f"{source}: not the student's vocabulary: token {differ!r} is {theirs.get(differ, 'unknown')} in it and "
            f"{ours.get(differ, 'unknown')} in the student; distillation compares distributions token by token, so "
            "take a teacher of the same family, or train on its texts with sft"
        )
    model = load_model(folder, dtype=policy.model.dtype).to(policy.model.device)
    model.keep_tokens(policy.model.spec.vocab_size, source)
    return model.requires_grad_(False).eval()


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Every token's id; of an encoder-decoder's pair also the source's."""
    if not isinstance(tokenizer, PairTokenizer):
        return tokenizer.get_vocab()
    source = {f"source {token}": id_ for token, id_ in tokenizer.source.get_vocab().items()}
    return {**tokenizer.target.get_vocab(), **source, "decoder start": tokenizer.decoder_start_token_id}


class Distill(PolicyLearner):
    """Student, frozen teacher, prompts with or without completions."""

    def __init__(self, options: DistillOptions, policy: Policy) -> None:
        self.task = load_task(options.task) if options.task else None
        self.higher_is_better = self.task is not None
        fitting = within_context(options, policy)
        found = load_items(fitting, policy.tokenizer, self.task)
        self.items, self.held_out, self.account, longest = with_room(options, policy, *found)
        if self.task is not None:
            held, _ = held_out_of(self.task, policy, options.eval_samples, options.max_completion_length)
            self.account = self.account.and_held_out(held)
        self.teacher = load_teacher(str(options.teacher), policy)
        super().__init__(options, policy, len(self.items))
        self.engine = make_engine(
            policy,
            sequences=max(options.num_prompts * options.num_generations, len(self.held_out)),
            longest=longest + options.max_completion_length,
        )

    def step(self, step: int) -> StepResult:
        """Sample where the student answers, take the data elsewhere, one update towards the teacher."""
        o, started = self.options, time.perf_counter()
        items = [self.items[i] for i in self.order.take(o.num_prompts)]
        own = int((step + 1) * o.num_prompts * o.on_policy_fraction + 1e-9)
        own -= int(step * o.num_prompts * o.on_policy_fraction + 1e-9)
        groups = self.sample(items[:own], seed=o.seed * 1_000_003 + step, n=o.num_generations)
        sampled = time.perf_counter() - started
        rollouts = [r for group in groups for r in group.rollouts]
        examples = [_example(r) for r in rollouts] + [_completion(item) for item in items[own:]]
        trained = sum(sum(e.mask) for e in examples)
        batches, order = self.micro_batches(weighted(examples, 1 / trained), feed_last=True)
        values: list[Tensor] = []
        loss = partial(self._loss, values=values)
        metrics = self.update(step, batches, loss, Forward(logp=False, hidden=True))
        self.weights_moved()
        per_sequence = _in_order(values, batches, order)
        metrics |= _origins(per_sequence, len(rollouts))
        self._record(step, groups, per_sequence)
        seconds = time.perf_counter() - started
        tokens = sum(len(e.tokens) for e in examples)
        if rollouts:
            metrics |= length_metrics(rollouts)
        metrics |= {"seconds/rollout": sampled, "seconds/update": seconds - sampled, "num_tokens": float(trained)}
        return StepResult({**metrics, "tokens_per_second": tokens / seconds}, trained)

    def sample(
        self, items: Sequence[Item], *, seed: int, n: int = 1, temperature: float | None = None
    ) -> list[RolloutGroup]:
        """The student's completions; they depend on (seed, prompt, sample) only."""
        if not items:
            return []
        o = self.options
        params = SamplingParams(
            max_tokens=o.max_completion_length,
            n=n,
            temperature=o.temperature if temperature is None else temperature,
            seed=seed,
        )
        self.policy.model.eval()
        prompts = [item.prompt for item in items if item.prompt is not None]
        with torch.no_grad():
            return sample(self.engine, self.policy.tokenizer, prompts, params, [item.tools for item in items])

    def _loss(self, batch: Batch, out: Outputs, values: list[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        o = self.options
        with torch.no_grad():
            context = PackedContext(batch.lengths, batch.parents, device=batch.tokens_T.device)
            teacher_ND = self.teacher(batch.tokens_T, context).index_select(0, batch.rows_N)
        loss_N = linear_divergence(
            out.hidden_ND,
            self.policy.model.head_weight,
            teacher_ND,
            self.teacher.head_weight,
            kind=o.divergence,
            weight=o.jsd_weight,
            temperature=o.temperature,
        )
        values.append(loss_N.detach().cpu())
        return loss_N, {}

    def evaluate(self, step: int) -> Evaluation | None:
        """Greedy accuracy on the task's held-out problems, or the divergence per token on held-out rows.

        Rows without a completion are completed by the student, greedily.
        """
        o = self.options
        if self.task is not None:
            if not o.eval_samples:
                return None
            groups = held_out_groups(self.policy, self.task, o.eval_samples, o.max_completion_length)
            if self.run is not None:
                self.run.record_rollouts(step, groups, split="eval")
            accuracy = evaluate(groups)
            return Evaluation("accuracy", {"accuracy": accuracy})
        if not self.held_out:
            return None
        answered = [item for item in self.held_out if item.example is not None]
        groups = self.sample([i for i in self.held_out if i.example is None], seed=o.seed, temperature=0.0)
        examples = [_completion(i) for i in answered] + [_example(g.rollouts[0]) for g in groups]
        values: list[Tensor] = []
        batches, _ = self.micro_batches(examples, feed_last=True)
        with evaluating(self.policy.model):
            for batch in batches:
                self._loss(batch, Forward(logp=False, hidden=True)(self.policy.model, batch), values)
        found = per_token(torch.cat(values), batches)
        return Evaluation("eval_divergence", {"eval_divergence": found, "eval_rows": len(examples)})

    def _record(self, step: int, groups: list[RolloutGroup], per_sequence: Sequence[Tensor]) -> None:
        """The student's samples in the store, each token's divergence beside it; the reward is minus their mean."""
        rollouts = [r for group in groups for r in group.rollouts]
        for rollout, value in zip(rollouts, per_sequence, strict=False):
            rollout.reward = Reward(-float(value.double().mean()))
        if self.run is not None and groups:
            own = [value.tolist() for value in per_sequence[: len(rollouts)]]
            self.run.record_rollouts(step + 1, groups, arrays={"divergence": own})

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        prompts = (item.prompt and prompt_row(item.prompt) for item in self.items)
        answers = (item.example and (item.example.tokens, item.example.mask) for item in self.items)
        return self.policy.tokenizer, zip(prompts, answers, strict=True)


def _example(rollout: Rollout) -> Example:
    return Example([*rollout.prompt_tokens, *rollout.tokens], [False] * len(rollout.prompt_tokens) + list(rollout.mask))


def _completion(item: Item) -> Example:
    assert item.example is not None
    return item.example


def _in_order(values: Sequence[Tensor], batches: Sequence[Batch], parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each example's per-token values, in the order of the examples."""
    found: dict[int, Tensor] = {}
    for value, batch, part in zip(values, batches, parts, strict=True):
        counts = torch.bincount(batch.sequence_N.cpu(), minlength=len(part)).tolist()
        found |= dict(zip(part, value.split(counts), strict=True))
    return [found[i] for i in range(len(found))]


def _origins(per_sequence: Sequence[Tensor], own: int) -> dict[str, float]:
    """Mean divergence per token where the student wrote, and where the data did."""
    sets = {"distill/on_policy": per_sequence[:own], "distill/off_policy": per_sequence[own:]}
    return {name: float(torch.cat(list(some)).double().mean()) for name, some in sets.items() if some}


distill = Recipe("distill", Distill.of)
