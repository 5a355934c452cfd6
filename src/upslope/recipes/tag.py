"""Tagging: one tag per word, by likelihood or by expected reward.

policy pi(a | word in its sentence) over tags = softmax of the encoder's logits at the word's first sub-word
    cross_entropy             J = mean over words of log pi(y)
    policy_gradient           J = mean over words of sum_a pi(a) r(y, a)
    policy_gradient_sampled   the same J from K sampled tags per word
The later sub-words of a word, and the special tokens, carry no tag. A sentence longer than max_length is split between
words; every word is trained, and measured, in the piece it falls into. Words are tagged one by one (no search over
sequences), so a predicted sequence may break IOB2; strict entity measures then count it as wrong. What it shares with
classify is in loop/encoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upslope.data.labels import (
    TaggedSentence,
    count_copies,
    labels_of,
    read_conll,
    shuffled_by_content,
    split_sentences,
)
from upslope.evaluation.classification import entity_report, token_report
from upslope.loop.encoder import Data, LabelLearner, Rows, account_of, prepared, rewards_of, tell_counts
from upslope.loop.session import Recipe
from upslope.models.encoder.items import Sentences, Start, cut_words, pieces_of
from upslope.models.encoder.network import Encoder
from upslope.options.supervised import TagOptions
from upslope.training.stopping import Evaluation


def make_learner(options: TagOptions, start: Start | None = None) -> Tag:
    """What a run trains, in a `with`; a `start` already loaded is trained in place."""
    found = read_splits(options)
    start, data = prepared(options, start, "tag", found, encode_splits)
    return Tag(options, start, data)


class Tag(LabelLearner):
    """One tag per word, measured by the F1 of whole entities (by token accuracy where tags are not IOB2)."""

    def __init__(self, options: TagOptions, start: Start, data: Data) -> None:
        super().__init__(options, start, data.train, data)
        self.entities = options.tag_scheme != "none"

    def evaluate(self, step: int) -> Evaluation | None:
        """Entity F1 and token accuracy on dev."""
        metrics, _ = self.measure(self.data.dev)
        measure = next(name for name in ("reward", "f1", "token_accuracy") if name in metrics)
        return Evaluation(measure, metrics, metrics["eval_loss"])

    def measure(
        self, sentences: Sentences, encoder: Encoder | None = None
    ) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
        """(headline figures, full reports) of greedy tags."""
        inputs = [x for pieces in sentences for x in pieces]
        found, loss = self.predicted(inputs, encoder)
        classes = iter(found)
        said = [[c for _ in pieces for c in next(classes)] for pieces in sentences]
        truth = [[t for x in pieces for t in x.targets] for pieces in sentences]
        names = self.encoder.labels
        said_tags, true_tags = ([[names[i] for i in row] for row in rows] for rows in (said, truth))
        reports: dict[str, Mapping[str, Any]] = {}
        metrics: dict[str, Any] = {}
        if self.entities:
            reports["entities"] = entity_report(true_tags, said_tags)
            overall = reports["entities"]["averages"]["micro"]
            metrics |= {name: overall[name] for name in ("f1", "precision", "recall")}
        reports["tokens"] = token_report(true_tags, said_tags, names)
        metrics |= {"token_accuracy": reports["tokens"]["accuracy"], "eval_loss": loss}
        if self.options.rewards is not None:
            metrics["reward"] = self.mean_reward((t for row in truth for t in row), (s for row in said for s in row))
        return metrics, reports


def read_splits(options: TagOptions) -> tuple[Rows, Rows, Rows]:
    """Training, dev and test sentences; dev is held out of the training file where no file is given."""
    train = Rows(options.data, _read(options, options.data))
    if options.eval_data is not None:
        dev = Rows(options.eval_data, _read(options, options.eval_data))
    else:
        labels_of(train.rows, options.data)
        kept, held = split_sentences(train.rows, share=options.eval_share, seed=options.seed)
        train, dev = Rows(options.data, kept, lent=len(held)), Rows(f"{options.data}, held out", held)
    test = Rows("", [])
    if options.test_data is not None:
        test = Rows(options.test_data, _read(options, options.test_data))
    return train, dev.first(shuffled_by_content(dev.rows, seed=options.seed), options.eval_samples), test


def _read(options: TagOptions, source: str) -> list[TaggedSentence]:
    return read_conll(
        source, token_column=options.token_column, tag_column=options.tag_column, scheme=options.tag_scheme
    )


def encode_splits(options: TagOptions, start: Start, train: Rows, dev: Rows, test: Rows) -> Data:
    """Tokens and classes of every sentence; says on standard error what was split, cut or stands in two files."""
    labels, longest = start.encoder.labels, options.max_length
    splits = {"train": train, "dev": dev, "test": test}
    encoded = {name: pieces_of(found.rows, start.tokenizer, labels, longest) for name, found in splits.items()}
    split = {name: sum(len(pieces) > 1 for pieces in rows) for name, rows in encoded.items()}
    cut = {name: cut_words(splits[name].rows, rows, start.tokenizer, longest) for name, rows in encoded.items()}
    shared = {name: count_copies(splits[name].rows, train.rows) for name in ("dev", "test")}
    said = {f"sentences split at max_length {longest}": split, f"words cut to max_length {longest}": cut}
    tell_counts({**said, "sentences that also stand in the training data": shared})
    words = {n: sum(len(x.targets) for pieces in rows for x in pieces) for n, rows in encoded.items()}
    further = {"words": words, "labels": len(labels), "split": split, "cut": cut, "also_in_train": shared}
    return Data(**encoded, rewards=rewards_of(options, labels), account=account_of(splits, further))


tag = Recipe("tag", make_learner)
