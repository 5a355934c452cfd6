"""What classify and tag share: an encoder trained on labels, by likelihood or by expected reward.

for each batch of rows, N labelled items in it (texts, or words of sentences):
    z      = logits of the encoder at each item                       [N, C]
    loss   = cross_entropy:            -log pi(y)
             policy_gradient:          -sum_a pi(a) r(y, a)           exact, no sampling
             policy_gradient_sampled:  -1/K sum_k (r(y, a_k) - b) log pi(a_k),   a_k ~ pi
             squared_error:            (z - y)^2                       C = 1, y a number (classify only)
    AdamW step on sum(loss) / N                                       one denominator, whatever the micro-batches
at the end, the checkpoint that was best on dev is scored once on test
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import device_of_machine
from upslope.data.batching import PromptStream
from upslope.data.chat import load_tokenizer, token_count
from upslope.devices.hardware import choose_dtype
from upslope.errors import ConfigError, ModelError, RunError
from upslope.evaluation.classification import format_report
from upslope.loop.kept import DataAccount
from upslope.loop.session import StepResult
from upslope.loop.steps import in_steps
from upslope.models.encoder.network import Encoder, Kind, load_encoder
from upslope.models.files.sources import resolve
from upslope.models.lora_dropout import dropping, padded_keys
from upslope.options.encoder import EncoderOptions
from upslope.recipes.encoder_objective import Objective
from upslope.runs.folder import Run
from upslope.training.optim import MasterAdamW, decay_groups
from upslope.training.schedule import rate_at
from upslope.training.step import evaluating

__all__ = ["EncoderLearner", "Input", "Start", "load_start", "pads_of", "predict", "scores", "update"]


@dataclass(slots=True)
class Start:
    """The encoder to train and its tokenizer."""

    encoder: Encoder
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Input:
    """One sequence of tokens and its labelled items.

    places: the token that carries each item (empty: the text itself is the one item). targets: the class of each item
    (int), or the number that it is to be given (float). row: index of the row it comes from; first: number of the
    row's items that stand in earlier inputs.
    """

    tokens: list[int]
    targets: Sequence[Any]
    places: list[int]
    types: list[int] | None = None
    row: int = 0
    first: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs. items_N: index of each item among B (text) or B * T (tokens); rows_N, counters_N: its address."""

    ids_BT: Tensor
    mask_BT: Tensor
    types_BT: Tensor | None
    items_N: Tensor
    targets_N: Tensor
    rows_N: list[int]
    counters_N: list[int]


def load_start(options: EncoderOptions, kind: Kind, labels: Sequence[str] | None) -> Start:
    """The encoder of `--model` with a head for `labels`, adapters if asked, in the compute dtype; and its tokenizer."""
    folder = resolve(options.model)
    device = device_of_machine()
    dtype, _ = choose_dtype(options.dtype, device)
    tokenizer = load_tokenizer(folder)
    if kind == "tag" and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = _with_prefix_space(folder)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no padding token; name one in tokenizer_config.json")
    encoder = load_encoder(
        folder, kind, labels=labels, gradient_checkpointing=options.gradient_checkpointing, seed=options.seed
    )
    encoder.check_tokens(token_count(tokenizer), folder)
    if encoder.fresh:
        print(f"upslope: {folder.name}: fresh, drawn from the seed: {', '.join(encoder.fresh)}", file=sys.stderr)
    if options.lora_rank:
        encoder.add_adapters(**options.adapters)
    return Start(encoder.to_compute(dtype, device), tokenizer)


def _with_prefix_space(folder: Path) -> Any:
    """Byte-level tokenizers see a word of a list as they see it in a sentence only with the space before it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, add_prefix_space=True)


def check_length(options: Any, encoder: Encoder) -> None:
    """ConfigError when --max-length is more than the encoder reads."""
    if encoder.max_positions is not None and options.max_length > encoder.max_positions:
        raise ConfigError(f"max_length is {options.max_length}, but the model reads {encoder.max_positions} tokens")


def groups_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Inputs of like length together, each group at most `budget` tokens with its padding (one input if longer).

    A group also ends where the next input is shorter than its longest by a quarter and by more than 6 tokens: padding
    costs as much as text. Longest first; the result depends on nothing but the arguments.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        short = longest - lengths[index] > max(6, longest / 4)
        if not groups or short or (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def collate(inputs: Sequence[Input], encoder: Encoder, pad: int, pad_type: int = 0) -> Batch:
    """Pad on the encoder's side and address every item."""
    width = max(len(x.tokens) for x in inputs)
    left = encoder.padding_side == "left"

    def padded(values: Sequence[int], fill: int) -> list[int]:
        gap = [fill] * (width - len(values))
        return [*gap, *values] if left else [*values, *gap]

    items, rows, counters = [], [], []
    for b, x in enumerate(inputs):
        shift = b * width + (width - len(x.tokens) if left else 0)
        items += [shift + place for place in x.places] or [b]
        rows += [x.row] * len(x.targets)
        counters += range(x.first, x.first + len(x.targets))
    device = encoder.device

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    types = None if inputs[0].types is None else tensor([padded(x.types or [], pad_type) for x in inputs])
    return Batch(
        ids_BT=tensor([padded(x.tokens, pad) for x in inputs]),
        mask_BT=tensor([padded([1] * len(x.tokens), 0) for x in inputs]),
        types_BT=types,
        items_N=tensor(items),
        targets_N=torch.tensor([t for x in inputs for t in x.targets], device=device),
        rows_N=rows,
        counters_N=counters,
    )


def item_logits(encoder: Encoder, batch: Batch) -> Tensor:
    """Logits of the labelled items, [N, C], in float32 or wider."""
    logits = encoder(batch.ids_BT, batch.mask_BT, batch.types_BT)
    flat = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.items_N)
    return flat.float() if flat.dtype.itemsize < 4 else flat


def keys_of(encoder: Encoder, batch: Batch) -> Tensor:
    """What decides the dropout of adapters, a key per row as the layers meet them; XLNet's stand [T, B]."""
    keys_BT = padded_keys(batch.ids_BT, batch.mask_BT)
    return keys_BT.t() if encoder.config.model_type == "xlnet" else keys_BT


def update(
    encoder: Encoder,
    optimizer: MasterAdamW,
    batches: Iterable[Batch],
    objective: Objective,
    *,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimizer step on the mean loss over all items of all batches.

    Returns loss, mean expected reward and share of right greedy labels (not where the targets are numbers), and the
    gradient norm before clipping. On RunError (a loss or gradient that is not finite) nothing has changed.
    """
    batches = list(batches)
    count = sum(len(b.rows_N) for b in batches)
    named = objective.kind != "squared_error"
    totals = {"loss": 0.0, "reward": 0.0, "accuracy": 0.0} if named else {"loss": 0.0}
    optimizer.zero_grad()
    try:
        with dropping(encoder, batches, partial(keys_of, encoder), step) as prepared:
            for batch in prepared:
                logits = item_logits(encoder, batch)
                losses = objective(logits, batch.targets_N, step=step, rows_N=batch.rows_N, counters_N=batch.counters_N)
                loss = losses.sum() / count
                value = float(loss.detach())
                if value != value or abs(value) == float("inf"):
                    raise RunError(f"the loss is {value}: stopped before the update, the last checkpoint is untouched")
                loss.backward()
                totals["loss"] += value
                if not named:
                    continue
                scores = logits.detach()
                rewards = objective.rewards_CC.to(scores.device)[batch.targets_N]
                totals["reward"] += float((scores.softmax(-1) * rewards).sum()) / count
                totals["accuracy"] += float((scores.argmax(-1) == batch.targets_N).sum()) / count
        totals["grad_norm"] = optimizer.step(learning_rate, max_norm=max_grad_norm)
    except RunError:
        optimizer.zero_grad()
        raise
    return {**totals, "learning_rate": learning_rate, "num_items": count}


def scores(
    encoder: Encoder, inputs: Sequence[Input], *, pad: int, pad_type: int = 0, budget: int
) -> list[list[list[float]]]:
    """The logits of every item, per input, in the order of the inputs."""
    found: list[list[list[float]]] = [[] for _ in inputs]
    with evaluating(encoder):
        for group in groups_of([len(x.tokens) for x in inputs], budget):
            batch = collate([inputs[i] for i in group], encoder, pad, pad_type)
            logits = item_logits(encoder, batch).tolist()
            for i in group:
                found[i] = logits[: len(inputs[i].targets)]
                logits = logits[len(inputs[i].targets) :]
    return found


def predict(encoder: Encoder, inputs: Sequence[Input], *, pad: int, pad_type: int = 0, budget: int) -> list[list[int]]:
    """The likeliest class of every item, per input, in the order of the inputs; the first of equally likely ones."""
    return likeliest(scores(encoder, inputs, pad=pad, pad_type=pad_type, budget=budget))


def likeliest(found: Sequence[Sequence[Sequence[float]]]) -> list[list[int]]:
    """The place of every item's highest score, the first of equal ones."""
    return [[max(range(len(z)), key=z.__getitem__) for z in items] for items in found]


def pads_of(tokenizer: Any) -> tuple[int, int]:
    """The token and the token type that padding is made of."""
    return tokenizer.pad_token_id, getattr(tokenizer, "pad_token_type_id", 0) or 0


def make_optimizer(encoder: Encoder, options: EncoderOptions) -> MasterAdamW:
    """AdamW over trunk (or adapters) and head, the head at its own rate."""
    named = list(encoder.named_parameters())
    trunk = [(n, p) for n, p in named if not encoder.is_head(n)]
    head = [(n, p) for n, p in named if encoder.is_head(n)]
    groups = decay_groups(trunk, weight_decay=options.weight_decay)
    groups += decay_groups(head, weight_decay=options.weight_decay, lr_factor=options.head_lr_factor)
    optimizer = MasterAdamW(groups, masters=encoder.masters)
    encoder.masters = {n: t for n, t in encoder.masters.items() if n not in optimizer.masters}
    return optimizer


class EncoderLearner:
    """One label per item: what the training loop needs except how a kind of data is measured.

    `rows` are the training rows, each as the inputs it was cut into. A subclass adds `evaluate`.
    """

    higher_is_better = True

    def __init__(
        self,
        options: EncoderOptions,
        start: Start,
        rows: Sequence[Sequence[Input]],
        rewards: Sequence[Sequence[float]],
        account: DataAccount,
    ) -> None:
        self.encoder, self.tokenizer = start.encoder, start.tokenizer
        self.run: Run | None = None
        self.rows, self.account = rows, account
        self.options = options = in_steps(options, len(rows))
        self.objective = Objective(
            kind=options.objective,
            rewards_CC=torch.tensor(rewards, dtype=torch.float32),
            num_samples=options.num_samples,
            baseline=options.baseline,
            label_smoothing=options.label_smoothing,
            seed=options.seed,
        )
        self.order = PromptStream(len(rows), seed=options.seed)
        self.optimizer = make_optimizer(self.encoder, options)

    def step(self, step: int) -> StepResult:
        """One batch, one update."""
        o = self.options
        inputs = [x for i in self.order.take(o.batch_size) for x in self.rows[i]]
        groups = groups_of([len(x.tokens) for x in inputs], o.micro_batch_tokens)
        self.encoder.train()
        metrics = update(
            self.encoder,
            self.optimizer,
            [collate([inputs[i] for i in group], self.encoder, *self.pads) for group in groups],
            self.objective,
            step=step,
            learning_rate=rate_at(o, step),
            max_grad_norm=o.max_grad_norm,
        )
        return StepResult(metrics, sum(len(x.tokens) for x in inputs))

    @property
    def pads(self) -> tuple[int, int]:
        """The token and the token type that padding is made of."""
        return pads_of(self.tokenizer)

    def name_of(self, target: float) -> str:
        """A target's label, or the number itself."""
        return str(target) if isinstance(target, float) else self.encoder.labels[target]

    def describe(self, report: Mapping[str, Any]) -> str:
        """A report that `measure` gave, as text."""
        return format_report(report)

    def predicted(self, inputs: Sequence[Input], encoder: Encoder | None = None) -> tuple[list[list[int]], float]:
        """The likeliest classes, by the encoder in training or another one, and the mean cross-entropy of the right."""
        pad, pad_type = self.pads
        budget = self.options.micro_batch_tokens
        found = scores(encoder or self.encoder, inputs, pad=pad, pad_type=pad_type, budget=budget)
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

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments; with adapters also what is trained, because the model folder holds them merged."""
        trained = {"weights": self.optimizer.weights()} if self.options.lora_rank else {}
        return {"optimizer": self.optimizer.state(), **trained}

    def state(self) -> dict[str, Any]:
        """The data position, and what the head's outputs stand for."""
        return {"order": self.order.state_dict(), "labels": list(self.encoder.labels)}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. RunError: the data have other labels now."""
        was, are = state.get("labels", self.encoder.labels), self.encoder.labels
        if list(was) != list(are):
            differ = sorted(set(was) ^ set(are)) or list(are)
            raise RunError(
                f"{self.options.data}: the labels are others than in the run ({', '.join(differ[:5])}), and its head "
                "has one output for each; bring the labels back, or start a new run"
            )
        weights = tensors["weights"] if self.options.lora_rank else self.encoder.read(model)
        self.optimizer.load(weights, tensors["optimizer"])
        self.order.load_state_dict(state["order"])

    def write_model(self, folder: Path) -> None:
        """A folder that transformers loads by itself: float32 masters, adapters merged, the tokenizer."""
        self.encoder.save(folder, self.optimizer.weights(), self.tokenizer)
