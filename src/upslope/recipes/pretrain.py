"""Pretraining: maximum likelihood of text, from random weights.

a tokenizer is trained on the texts; they become one row of tokens, read in windows of L
for each batch of windows, shuffled anew in every pass:
    logp_t = log pi(token_t | tokens before t in the window)      every token of the text is predicted once a pass
    loss   = -sum_t logp_t / N                                     N predicted tokens in the whole batch
             label_smoothing e: -(1 - e) logp_t - e mean_v log pi(v)                          (1512.00567)
             masked objective:  pretrain_masked.py
    AdamW step on the float32 masters
held out: perplexity = exp(-sum_t logp_t / tokens) over overlapping windows, and bits per byte =
    -sum_t logp_t / (bytes ln 2), which compares models whose tokenizers differ
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upslope.build import Policy
from upslope.errors import DataError
from upslope.loop.learner import PolicyLearner
from upslope.loop.session import Recipe
from upslope.loop.texts import Texts, load_texts, objective_of, start_encoder, start_policy, start_tokenizer
from upslope.options.supervised import PretrainOptions
from upslope.recipes.pretrain_masked import MaskedPretrain
from upslope.training.step import score
from upslope.training.stopping import Evaluation, StepResult
from upslope.types import Example


@contextmanager
def make_learner(options: PretrainOptions, policy: Policy | None = None) -> Iterator[Pretrain | MaskedPretrain]:
    """What a run trains; a causal `policy` already loaded is trained in place, with its tokenizer."""
    objective = "causal" if policy is not None else objective_of(options)
    tokenizer = policy.tokenizer if policy is not None else start_tokenizer(options, objective)
    if objective == "masked":
        yield MaskedPretrain(options, start_encoder(options, tokenizer), tokenizer)
        return
    with tempfile.TemporaryDirectory(prefix="upslope-pretrain-") as folder:
        texts = causal_texts(options, tokenizer)
        yield Pretrain(options, policy or start_policy(options, tokenizer, Path(folder)), texts)


def causal_texts(options: PretrainOptions, tokenizer: Any) -> Texts:
    """Training text, and as much held-out text as `eval_samples` strided windows score."""
    limit = options.eval_samples * stride_of(options) if options.eval_samples else None
    return load_texts(options, tokenizer, max_eval_tokens=limit)


def stride_of(options: PretrainOptions) -> int:
    """Tokens that each held-out window scores."""
    return options.eval_stride or max(1, options.context_length // 2)


class Pretrain(PolicyLearner):
    """Maximum likelihood of windows of text, measured by held-out perplexity and bits per byte."""

    higher_is_better = False

    def __init__(self, options: PretrainOptions, policy: Policy, texts: Texts) -> None:
        self.texts = texts
        windows = texts.train.num_windows(options.context_length)
        if not windows:
            raise DataError("the training text has no two tokens: there is nothing to predict")
        super().__init__(options, policy, windows)
        self.held_out = [
            Example(tokens, [t >= first for t in range(len(tokens))])
            for tokens, first in texts.held_out.strided(options.context_length, stride_of(options))
        ]
        self.account = texts.account(windows, len(self.held_out))

    def step(self, step: int) -> StepResult:
        """One batch of windows, one update."""
        o = self.options
        return self.imitate(
            step, [_example(self.texts.train.window(i, o.context_length)) for i in self.order.take(o.batch_size)]
        )

    def evaluate(self, step: int) -> Evaluation | None:
        """Perplexity per token and bits per byte of the held-out text."""
        out = score(self.policy.model, self.micro_batches(self.held_out)[0])
        total, count = float(-out.logp_N.double().sum()), out.logp_N.shape[0]
        metrics = {
            "perplexity": math.exp(min(total / count, 700.0)),
            "bits_per_byte": total / self.texts.held_out.bytes / math.log(2),
            "nats_per_byte": total / self.texts.held_out.bytes,
            "eval_loss": total / count,
            **self._unknown(),
        }
        return Evaluation("perplexity", metrics)

    def _unknown(self) -> dict[str, float]:
        """Where words are [UNK] the numbers flatter: predicting that a word is unknown is easier than spelling it."""
        unknown = self.policy.tokenizer.unk_token_id
        if unknown is None or unknown == self.policy.tokenizer.eos_token_id:
            return {}
        return {"unknown_share": float((self.texts.held_out.tokens == unknown).mean())}

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer, unless it is the run's own, and the text, for the fingerprint."""
        return None if self.options.new else self.policy.tokenizer, iter([self.texts.corpus.sha256])


def _example(window: list[int]) -> Example:
    return Example(window, [False] + [True] * (len(window) - 1))


pretrain = Recipe("pretrain", make_learner)
