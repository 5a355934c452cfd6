"""Text classification: one label per text, by likelihood or by expected reward.

policy pi(a | x) over labels = softmax of the encoder's logits; r(y, a) = reward of saying a where y is right
    cross_entropy             J = mean log pi(y | x)
    policy_gradient           J = mean sum_a pi(a | x) r(y, a); gradient in logit j: pi_j (r_j - sum_k pi_k r_k)
    policy_gradient_sampled   the same J; gradient from K sampled labels (Williams 1992), unbiased but for baseline
                              "mean", which shrinks it by (K - 1) / K
With 0/1 rewards the exact gradient is cross-entropy's times pi(y | x): it weighs what the model already half knows
and vanishes where it is confidently wrong. The loop is in recipes/encoder.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upslope.data.labels import (
    LabelledText,
    check_known,
    count_copies,
    labels_of,
    read_labelled,
    read_rewards,
    shuffled_by_content,
    split_by_content,
)
from upslope.errors import ConfigError
from upslope.evaluation.classification import classification_report
from upslope.extras import require
from upslope.models.encoder import Encoder
from upslope.options.encoder import ClassifyOptions
from upslope.recipes.encoder import EncoderLearner, Input, Start, check_length, load_start
from upslope.recipes.encoder_report import finish, show
from upslope.recipes.session import Evaluation, conclude, train

__all__ = ["Classify", "classify", "run"]


def run(options: ClassifyOptions) -> int:
    """The verb `upslope classify`."""
    if options.dry_run:
        learner, data = _prepare(options, None)
        return show(options, learner, data.facts)
    return conclude(options, classify(options))


def classify(options: ClassifyOptions, *, start: Start | None = None) -> dict[str, Any]:
    """Train and return the summary, dev and test figures in it; a `start` already loaded is trained in place."""
    learner, data = _prepare(options, start)
    summary = train("classify", learner.options, learner)
    splits = {"dev": data.dev} | ({"test": data.test} if data.test else {})
    return finish(learner, summary | {"data": data.facts}, splits)


@dataclass(frozen=True, slots=True)
class Data:
    """Encoded splits and what is to be said about them."""

    train: list[Input]
    dev: list[Input]
    test: list[Input]
    rewards: list[list[float]]
    facts: dict[str, Any]


class Classify(EncoderLearner):
    """One label per text, measured by accuracy (mean reward where rewards are given)."""

    def __init__(self, options: ClassifyOptions, start: Start, data: Data) -> None:
        super().__init__(options, start, [[x] for x in data.train], data.rewards)
        self.dev = data.dev

    def evaluate(self, step: int) -> Evaluation | None:
        """Accuracy and macro F1 on dev."""
        metrics, _ = self.measure(self.dev)
        return Evaluation(metrics["reward"] if "reward" in metrics else metrics["accuracy"]["value"], metrics)

    def measure(
        self, inputs: Sequence[Input], encoder: Encoder | None = None
    ) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
        """(headline figures, full report) of greedy labels."""
        truth = [x.targets[0] for x in inputs]
        said = [classes[0] for classes in self.predicted(inputs, encoder)]
        names = self.encoder.labels
        report = classification_report([names[i] for i in truth], [names[i] for i in said], names)
        metrics = {"accuracy": report["accuracy"], "macro_f1": report["averages"]["macro"]["f1"]}
        if self.options.rewards is not None:
            metrics["reward"] = self.mean_reward(truth, said)
        return metrics, {"labels": report}


def _prepare(options: ClassifyOptions, start: Start | None) -> tuple[Classify, Data]:
    require("eval", "sklearn")
    train_rows, dev_rows, test_rows = read_splits(options)
    labels = labels_of(train_rows, options.data)
    check_known(dev_rows, labels)
    check_known(test_rows, labels)
    start = start or load_start(options, "classify", labels)
    if set(start.encoder.labels) != set(labels):
        raise ConfigError(f"the encoder's labels are not the {len(labels)} of {options.data}; load it with those")
    check_length(options, start.encoder)
    data = encode_splits(options, start, train_rows, dev_rows, test_rows)
    return Classify(options, start, data), data


def read_splits(options: ClassifyOptions) -> tuple[list[LabelledText], list[LabelledText], list[LabelledText]]:
    """Training, dev and test rows; dev is held out of the training rows where no file is given."""
    train_rows = _read(options, options.data)
    if options.eval_data is not None:
        dev_rows = _read(options, options.eval_data)
    else:
        labels_of(train_rows, options.data)
        train_rows, dev_rows = split_by_content(train_rows, share=options.eval_share, seed=options.seed)
    test_rows = _read(options, options.test_data) if options.test_data is not None else []
    return train_rows, shuffled_by_content(dev_rows, seed=options.seed)[: options.eval_samples], test_rows


def _read(options: ClassifyOptions, source: str) -> list[LabelledText]:
    return read_labelled(
        source,
        text_column=options.text_column,
        label_column=options.label_column,
        pair_column=options.pair_column,
    )


def encode_splits(
    options: ClassifyOptions,
    start: Start,
    train_rows: Sequence[LabelledText],
    dev_rows: Sequence[LabelledText],
    test_rows: Sequence[LabelledText],
) -> Data:
    """Tokens and classes of every row; says on standard error how many were cut and how many splits share."""
    labels = start.encoder.labels
    encoded, cut = {}, {}
    for name, rows in (("train", train_rows), ("dev", dev_rows), ("test", test_rows)):
        encoded[name], cut[name] = inputs_of(rows, start.tokenizer, labels, options.max_length)
    shared = {name: count_copies(rows, train_rows) for name, rows in (("dev", dev_rows), ("test", test_rows))}
    if any(cut.values()):
        print(f"upslope: cut to max_length {options.max_length}: {_counts(cut)}", file=sys.stderr)
    if any(shared.values()):
        print(f"upslope: rows that also stand in the training data: {_counts(shared)}", file=sys.stderr)
    facts = {
        "rows": {name: len(rows) for name, rows in encoded.items()},
        "labels": len(labels),
        "cut": cut,
        "also_in_train": shared,
    }
    rewards = read_rewards(options.rewards, labels) if options.rewards is not None else _zero_one(len(labels))
    return Data(encoded["train"], encoded["dev"], encoded["test"], rewards, facts)


def inputs_of(
    rows: Sequence[LabelledText], tokenizer: Any, labels: Sequence[str], max_length: int
) -> tuple[list[Input], int]:
    """(inputs, how many were cut): the longer text of a pair is cut first."""
    if not rows:
        return [], 0
    texts = [row.text for row in rows]
    pairs = [row.pair or "" for row in rows] if rows[0].pair is not None else None
    whole = tokenizer(texts, pairs, truncation=False, verbose=False)
    long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
    short = {}
    if long:
        again = tokenizer(
            [texts[i] for i in long],
            None if pairs is None else [pairs[i] for i in long],
            truncation="longest_first",
            max_length=max_length,
        )
        short = {i: k for k, i in enumerate(long)}
    index = {label: i for i, label in enumerate(labels)}
    made = []
    for i, row in enumerate(rows):
        source, at = (again, short[i]) if i in short else (whole, i)
        types = source["token_type_ids"][at] if "token_type_ids" in source else None
        made.append(Input(list(source["input_ids"][at]), [index[row.label]], [], types, row=i))
    return made, len(long)


def _zero_one(count: int) -> list[list[float]]:
    return [[float(i == j) for j in range(count)] for i in range(count)]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
