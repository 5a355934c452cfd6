"""Text classification: one label per text, by likelihood or by expected reward; or one number, by squared error.

policy pi(a | x) over labels = softmax of the encoder's logits; r(y, a) = reward of saying a where y is right
    cross_entropy             J = mean log pi(y | x)
    policy_gradient           J = mean sum_a pi(a | x) r(y, a); gradient in logit j: pi_j (r_j - sum_k pi_k r_k)
    policy_gradient_sampled   the same J; gradient from K sampled labels (Williams 1992), unbiased but for baseline
                              "mean", which shrinks it by (K - 1) / K
    squared_error             J = -mean (z(x) - y)^2, y a number and z the head's one logit
With 0/1 rewards the exact gradient is cross-entropy's times pi(y | x): it weighs what the model already half knows
and vanishes where it is confidently wrong. What it shares with tag is in loop/encoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from upslope.data.glue import Split, form_of, labelled, read_items
from upslope.data.labels import (
    LabelledText,
    count_copies,
    labels_of,
    read_labelled,
    shuffled_by_content,
    split_by_content,
)
from upslope.errors import ConfigError
from upslope.evaluation.classification import classification_report, pearson, spearman
from upslope.loop.encoder import Data, LabelLearner, Rows, account_of, prepared, rewards_of, tell_counts
from upslope.loop.session import Recipe
from upslope.models.encoder.items import Input, Start, inputs_of
from upslope.models.encoder.network import Encoder
from upslope.options.supervised import ClassifyOptions
from upslope.runs.progress import told
from upslope.training.stopping import Evaluation

NUMBER = ("score",)
"""The one label of a head that gives a number."""


def make_learner(options: ClassifyOptions, start: Start | None = None) -> Classify:
    """What a run trains, in a `with`; a `start` already loaded is trained in place."""
    found = read_splits(options)
    start, data = prepared(
        options,
        start,
        "classify",
        found,
        encode_splits,
        labels=NUMBER if options.objective == "squared_error" else None,
    )
    return Classify(options, start, data)


class Classify(LabelLearner):
    """One label per text, measured by accuracy (mean reward where rewards are given); of numbers the correlations."""

    def __init__(self, options: ClassifyOptions, start: Start, data: Data) -> None:
        super().__init__(options, start, [[x] for x in data.train], data)

    def evaluate(self, step: int) -> Evaluation | None:
        """Accuracy and macro F1 on dev; of numbers Pearson's and Spearman's correlation."""
        metrics, _ = self.measure(self.data.dev)
        if self.options.objective == "squared_error":
            return Evaluation("pearson", metrics, metrics["eval_loss"])
        return Evaluation("reward" if "reward" in metrics else "accuracy", metrics, metrics["eval_loss"])

    def measure(
        self, inputs: Sequence[Input], encoder: Encoder | None = None
    ) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
        """(headline figures, full report) of greedy labels, or of the numbers given."""
        if self.options.objective == "squared_error":
            return self._correlations(inputs, encoder)
        truth = [int(x.targets[0]) for x in inputs]
        classes, loss = self.predicted(inputs, encoder)
        said = [own[0] for own in classes]
        names = self.encoder.labels
        report = classification_report([names[i] for i in truth], [names[i] for i in said], names)
        metrics = {"accuracy": report["accuracy"], "macro_f1": report["averages"]["macro"]["f1"], "eval_loss": loss}
        if self.options.rewards is not None:
            metrics["reward"] = self.mean_reward(truth, said)
        return metrics, {"labels": report}

    def _correlations(
        self, inputs: Sequence[Input], encoder: Encoder | None
    ) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
        said = [z[0][0] for z in self.scored(inputs, encoder)]
        truth = [float(x.targets[0]) for x in inputs]
        found = {"pearson": pearson(truth, said), "spearman": spearman(truth, said)}
        figures = {name: {**interval._asdict(), "n": len(truth)} for name, interval in found.items()}
        loss = sum((z - y) ** 2 for z, y in zip(said, truth, strict=True)) / len(truth)
        return {**figures, "eval_loss": loss}, {"numbers": figures}

    def describe(self, report: Mapping[str, Any]) -> str:
        """A report that `measure` gave, as text."""
        if self.options.objective != "squared_error":
            return super().describe(report)
        return "\n".join(
            [
                "one number per row",
                *(f"{k} {f['value']:.4f} [{f['low']:.4f}, {f['high']:.4f}] n={f['n']}" for k, f in report.items()),
            ]
        )


def read_splits(options: ClassifyOptions) -> tuple[Rows, Rows, Rows]:
    """Training, dev and test rows; dev is held out of the training rows where no file is given."""
    with told(f"reading {options.data}"):
        train = _read(options, options.data, "train")
    train_rows = train.rows
    if options.eval_data is not None:
        dev = _read(options, options.eval_data, "validation")
        dev_rows = dev.rows
    elif options.objective == "squared_error":
        alike = [replace(row, label="") for row in train_rows]  # numbers are no strata
        _, held = split_by_content(alike, share=options.eval_share, seed=options.seed)
        contents = {row.content for row in held}
        dev_rows = [row for row in train_rows if row.content in contents]
        train_rows = [row for row in train_rows if row.content not in contents]
    else:
        labels_of(train_rows, options.data)
        train_rows, dev_rows = split_by_content(train_rows, share=options.eval_share, seed=options.seed)
    if options.eval_data is None:
        train, dev = replace(train, rows=train_rows, lent=len(dev_rows)), Rows(f"{options.data}, held out", dev_rows)
    test = _read(options, options.test_data, "test") if options.test_data is not None else Rows("", [])
    return train, dev.first(shuffled_by_content(dev_rows, seed=options.seed), options.eval_samples), test


def _read(options: ClassifyOptions, source: str, split: Split) -> Rows:
    """Rows of a table by the columns' names, or of NAME:SOURCE, a task in GLUE or SuperGLUE form."""
    numbers = options.objective == "squared_error"
    found = form_of(source)
    if found is not None:
        if found[0].graded != numbers:
            what = "numbers: set objective = squared_error" if found[0].graded else "names: set another objective"
            raise ConfigError(f"objective is {options.objective}, but the labels of {source} are {what}")
        named = {"text_column": "text", "label_column": "label", "pair_column": None}
        changed = [name for name, default in named.items() if getattr(options, name) != default]
        if changed:
            raise ConfigError(f"{changed[0]}: the columns of {source} are named by its task; leave it out")
        items = read_items(source, split=split)
        torn = {"torn": len(items.broken)} if items.broken else {}
        return Rows(source, labelled(items), torn, {name: f"the first is {items.broken[0]}" for name in torn})
    found_rows = read_labelled(
        source,
        text_column=options.text_column,
        label_column=options.label_column,
        pair_column=options.pair_column,
        numbers=numbers,
    )
    return Rows(source, found_rows)


def encode_splits(options: ClassifyOptions, start: Start, train: Rows, dev: Rows, test: Rows) -> Data:
    """Tokens and classes of every row; says on standard error how many were cut and how many splits share."""
    labels = start.encoder.labels
    encoded, cut = {}, {}
    splits = {"train": train, "dev": dev, "test": test}
    for name, found in splits.items():
        targets = _targets(found.rows, labels)
        encoded[name], cut[name] = inputs_of(found.rows, start.tokenizer, targets, options.max_length)
    shared = {name: count_copies(splits[name].rows, train.rows) for name in ("dev", "test")}
    tell_counts({f"cut to max_length {options.max_length}": cut, "rows that also stand in the training data": shared})
    account = account_of(splits, {"labels": len(labels), "cut": cut, "also_in_train": shared})
    return Data(**encoded, rewards=rewards_of(options, labels), account=account)


def _targets(rows: Sequence[LabelledText], labels: Sequence[str]) -> list[float]:
    """The class of every row, or its number."""
    if tuple(labels) == NUMBER:
        return [float(row.label) for row in rows]
    index = {label: i for i, label in enumerate(labels)}
    return [index[row.label] for row in rows]


classify = Recipe("classify", make_learner)
