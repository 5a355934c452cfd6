"""What the recipes that train an encoder hold: its optimizer, labelled items, the report on the best checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.atomic import write_atomic
from upslope.data.labels import check_known, labels_of, read_rewards
from upslope.engine.sampling import draw, uniforms
from upslope.errors import ConfigError, RunError
from upslope.evaluation.classification import format_report
from upslope.extras import require
from upslope.functional.advantages import group_centered, leave_one_out
from upslope.functional.logprobs import log_softmax
from upslope.functional.policy_losses import reinforce
from upslope.functional.supervised_losses import classification_policy_gradient, nll
from upslope.loop.kept import BEYOND, DataAccount, Split
from upslope.loop.learner import Learner
from upslope.models.encoder.items import (
    Input,
    ItemBatch,
    Start,
    check_length,
    groups_of,
    item_logits,
    keys_of,
    likeliest,
    load_start,
    padded_batch,
    pads_of,
    scores,
)
from upslope.models.encoder.network import Encoder, Kind, load_encoder
from upslope.options.supervised import EncoderOptions
from upslope.runs.encoding import to_json
from upslope.training import checkpoint
from upslope.training.optim import MasterAdamW, decay_groups, rate_at
from upslope.training.step import update
from upslope.training.stopping import StepResult


class EncoderLearner(Learner):
    """A learner that trains an encoder; head_lr_factor: of its head's learning rate, where it has its own."""

    def __init__(self, options: Any, start: Start, order: int, *, head_lr_factor: float | None = None) -> None:
        super().__init__(options, order)
        self.encoder, self.tokenizer = start.encoder, start.tokenizer
        self.pads = pads_of(start.tokenizer)
        self.optimizer = make_optimizer(self.encoder, self.options.weight_decay, head_lr_factor)

    def batches(self, inputs: Sequence[Input]) -> list[ItemBatch]:
        """Padded micro-batches of inputs of like length."""
        groups = groups_of([len(x.tokens) for x in inputs], self.options.micro_batch_tokens)
        return [padded_batch([inputs[i] for i in group], self.encoder, *self.pads) for group in groups]

    def update(self, step: int, batches: Sequence[ItemBatch], loss: Any) -> dict[str, float]:
        """One optimizer step on the mean of `loss` over all items, as `training.step.update`."""
        count = sum(len(b.rows_N) for b in batches)
        self.encoder.train()
        metrics = update(
            self.encoder,
            self.optimizer,
            batches,
            loss,
            item_logits,
            learning_rate=rate_at(self.options, step),
            max_grad_norm=self.options.max_grad_norm,
            step=step,
            keys_of=partial(keys_of, self.encoder),
            denominator=max(1, count),
        )
        return {**metrics, "num_items": count}

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint."""
        return self.encoder.read(model)

    def write_model(self, folder: Path) -> None:
        """A folder that transformers loads by itself: float32 masters and the tokenizer."""
        self.encoder.save(folder, self.optimizer.weights(), self.tokenizer)


def make_optimizer(encoder: Encoder, weight_decay: float, head_lr_factor: float | None) -> MasterAdamW:
    """AdamW over trunk (or adapters) and head, the head at its own rate where it has one."""
    trunk, head = {}, {}
    for name, p in encoder.named_parameters():
        (head if head_lr_factor is not None and encoder.is_head(name) else trunk)[name] = p
    groups = decay_groups(trunk.items(), weight_decay=weight_decay)
    groups += decay_groups(head.items(), weight_decay=weight_decay, lr_factor=head_lr_factor or 0.0)
    optimizer = MasterAdamW(groups, masters=encoder.masters)
    encoder.masters = {n: t for n, t in encoder.masters.items() if n not in optimizer.masters}
    return optimizer


class LabelLearner(EncoderLearner):
    """One label per item: what the training loop needs except how a kind of data is measured.

    `rows` are the training rows, each as the inputs it was cut into. A subclass adds `evaluate` and `measure`.
    """

    def __init__(
        self,
        options: EncoderOptions,
        start: Start,
        rows: Sequence[Sequence[Input]],
        data: Data,
    ) -> None:
        super().__init__(options, start, len(rows), head_lr_factor=options.head_lr_factor)
        self.rows, self.data, self.account = rows, data, data.account
        self.objective = Objective(
            kind=options.objective,
            rewards_CC=torch.tensor(data.rewards, dtype=torch.float32),
            num_samples=options.num_samples,
            baseline=options.baseline,
            label_smoothing=options.label_smoothing,
            seed=options.seed,
        )

    def step(self, step: int) -> StepResult:
        """One batch, one update."""
        inputs = [x for i in self.order.take(self.options.batch_size) for x in self.rows[i]]
        metrics = self.update(step, self.batches(inputs), partial(self.loss, step))
        return StepResult(metrics, sum(len(x.tokens) for x in inputs))

    def loss(self, step: int, batch: ItemBatch, logits_NC: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The objective per item; expected reward, and whether the greedy label is right (not of numbers)."""
        objective = self.objective
        losses_N = objective(logits_NC, batch.targets_N, step=step, rows_N=batch.rows_N, counters_N=batch.counters_N)
        if objective.kind == "squared_error":
            return losses_N, {}
        said_NC = logits_NC.detach()
        rewards_NC = objective.rewards_CC.to(said_NC.device)[batch.targets_N]
        right_N = said_NC.argmax(-1) == batch.targets_N
        return losses_N, {"reward": said_NC.softmax(-1) * rewards_NC, "accuracy": right_N}

    def name_of(self, target: float) -> str:
        """A target's label, or the number itself."""
        return str(target) if isinstance(target, float) else self.encoder.labels[target]

    def describe(self, report: Mapping[str, Any]) -> str:
        """A report that `measure` gave, as text."""
        return format_report(report)

    def scored(self, inputs: Sequence[Input], encoder: Encoder | None = None) -> list[list[list[float]]]:
        """The logits of every item, by the encoder in training or another one."""
        pad, pad_type = self.pads
        budget = self.options.micro_batch_tokens
        return scores(encoder or self.encoder, inputs, pad=pad, pad_type=pad_type, budget=budget)

    def predicted(self, inputs: Sequence[Input], encoder: Encoder | None = None) -> tuple[list[list[int]], float]:
        """The likeliest classes, and the mean cross-entropy of the right ones."""
        found = self.scored(inputs, encoder)
        logits_NC = torch.tensor([z for items in found for z in items], dtype=torch.float64)
        targets_N = torch.tensor([target for x in inputs for target in x.targets])
        return likeliest(found), float(torch.nn.functional.cross_entropy(logits_NC, targets_N))

    def mean_reward(self, truth: Iterable[int], said: Iterable[int]) -> float:
        """Mean reward of what was said; with the default rewards it is the accuracy."""
        values = [float(self.objective.rewards_CC[t, s]) for t, s in zip(truth, said, strict=True)]
        return sum(values) / len(values)

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer and the training rows, for the fingerprint."""
        return self.tokenizer, ([(x.tokens, x.targets, x.places, x.types) for x in row] for row in self.rows)

    def reported(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Score the best checkpoint on dev and, this once, on test; write report.json and report.txt beside the run.

        The checkpoint is read back from its folder, so the figures are those of the model that is there. An interrupted
        run is left as it is: test waits for the end.
        """
        if summary["stopped"] == "interrupted":
            return summary
        folder = Path(summary["folder"])
        best = checkpoint.resolve(folder / "checkpoints", "best")
        ours, splits = self.encoder, {"dev": self.data.dev} | ({"test": self.data.test} if self.data.test else {})
        encoder = load_encoder(best.path / "model", ours.kind, labels=None).to_compute(ours.dtype, ours.device)
        measured, reports, texts = {}, {}, []
        for name, split in splits.items():
            measured[name], reports[name] = self.measure(split, encoder)
            for report in reports[name].values():
                texts.append(f"{name}, step {best.step}: {self.describe(report)}")
        text = "\n\n".join(texts)
        whole = {**summary, **measured, "best_step": best.step, "best_model": str(folder / "checkpoints/best/model")}
        write_atomic(folder / "report.json", to_json({"step": best.step, **reports}, indent=2) + "\n")
        write_atomic(folder / "report.txt", text + "\n")
        write_atomic(folder / "summary.json", to_json(whole, indent=2) + "\n")
        print(text, file=sys.stderr)
        return whole

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments; with adapters also what is trained, because the model folder holds them merged."""
        return super().tensors() | ({"weights": self.optimizer.weights()} if self.options.lora_rank else {})

    def state(self) -> dict[str, Any]:
        """The data position, and what the head's outputs stand for."""
        return {**super().state(), "labels": list(self.encoder.labels)}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. RunError: the data have other labels now."""
        was, are = state.get("labels", self.encoder.labels), self.encoder.labels
        if list(was) != list(are):
            differ = sorted(set(was) ^ set(are)) or list(are)
            raise RunError(
                f"{self.options.data}: the labels are others than in the run ({', '.join(differ[:5])}), and its head "
                "has one output for each; bring the labels back, or start a new run"
            )
        super().load(model, tensors, state)

    def trained_weights(self, model: Path, tensors: Mapping[str, dict[str, Tensor]]) -> Mapping[str, Tensor]:
        """The float32 masters of a checkpoint."""
        return tensors["weights"] if self.options.lora_rank else self.encoder.read(model)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a split in use, of which source, and what was left out; `lent`: rows of the source held out as dev."""

    source: str
    rows: list[Any]
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    lent: int = 0

    def first(self, rows: list[Any], most: int) -> Rows:
        """The first `most` of these same rows, put in another order."""
        beyond = {BEYOND: len(rows) - most} if len(rows) > most else {}
        return replace(self, rows=rows[:most], dropped={**self.dropped, **beyond})


@dataclass(frozen=True, slots=True)
class Data:
    """Encoded splits (of texts the inputs, of sentences the inputs of each), and what is to be said about them."""

    train: list[Any]
    dev: list[Any]
    test: list[Any]
    rewards: list[list[float]]
    account: DataAccount


def prepared(
    options: Any,
    start: Start | None,
    kind: Kind,
    found: tuple[Rows, Rows, Rows],
    encode: Callable[..., Data],
    *,
    labels: Sequence[str] | None = None,
) -> tuple[Start, Data]:
    """The encoder for the `labels` (default: those of the training rows), and the encoded rows of train, dev and test.

    ConfigError: another split has labels of its own, or the encoder that is given has others.
    """
    require("eval", "sklearn")
    train, dev, test = found
    if labels is None:
        labels = labels_of(train.rows, options.data)
        check_known(dev.rows, labels)
        check_known(test.rows, labels)
    start = start or load_start(options, kind, labels)
    if set(start.encoder.labels) != set(labels):
        what = "tags" if kind == "tag" else "labels"
        raise ConfigError(f"the encoder's {what} are not the {len(labels)} of {options.data}; load it with those")
    check_length(options, start.encoder)
    return start, encode(options, start, train, dev, test)


def rewards_of(options: EncoderOptions, labels: Sequence[str]) -> list[list[float]]:
    """The rewards of the options' file, else 1 for the right label and 0 for another."""
    if options.rewards is not None:
        return read_rewards(options.rewards, labels)
    return [[float(i == j) for j in range(len(labels))] for i in range(len(labels))]


def tell_counts(counts: Mapping[str, Mapping[str, int]]) -> None:
    """A line on standard error for each thing that happened in some split: in how many rows of which."""
    for what, by_split in counts.items():
        if any(by_split.values()):
            said = ", ".join(f"{count} of {name}" for name, count in by_split.items() if count)
            print(f"upslope: {what}: {said}", file=sys.stderr)


def account_of(splits: Mapping[str, Rows], further: Mapping[str, Any]) -> DataAccount:
    """What becomes of the rows of every split, and further facts about them."""
    kept = {n: Split(r.source, len(r.rows), r.dropped, r.notes, r.lent) for n, r in splits.items()}
    return DataAccount(kept, further)


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
