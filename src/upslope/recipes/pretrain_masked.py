"""Masked pretraining of an encoder (BERT; Devlin et al. 2019, arXiv 1810.04805, section 3.1, without the second task).

for each batch of windows, [CLS] tokens [SEP]:
    M      = each token with probability p, at least one            (data/batching.py)
    x'     = x with 80% of M as [MASK], 10% as another token, 10% left
    loss   = -sum_{t in M} log pi(x_t | x') / N                      N chosen tokens in the whole batch
    AdamW step on the float32 masters
which tokens are chosen depends on (seed, position in the data order), so every pass hides others
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from upslope.data.batching import Masking
from upslope.data.corpus import TokenStream
from upslope.errors import DataError
from upslope.functional.logprobs import log_softmax
from upslope.functional.supervised_losses import nll
from upslope.loop.encoder import EncoderLearner
from upslope.loop.texts import load_texts
from upslope.models.encoder.items import Input, ItemBatch, Start, item_logits
from upslope.models.encoder.network import Encoder
from upslope.models.protocol import evaluating
from upslope.options.supervised import PretrainOptions
from upslope.training.stopping import Evaluation, StepResult


class MaskedPretrain(EncoderLearner):
    """Likelihood of hidden tokens; held out: the loss, its exponential and the share guessed right, masks fixed."""

    higher_is_better = False

    def __init__(self, options: PretrainOptions, encoder: Encoder, tokenizer: Any) -> None:
        self.frame = [t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None]
        self.frame = self.frame if len(self.frame) == 2 else []
        self.width = options.context_length - len(self.frame)
        limit = options.eval_samples * self.width if options.eval_samples else None
        self.texts = load_texts(options, tokenizer, max_eval_tokens=limit)
        count = _count(self.texts.train, self.width)
        if not count:
            raise DataError("the training text has no tokens: there is nothing to predict")
        super().__init__(options, Start(encoder, tokenizer), count)
        special = set(tokenizer.all_special_ids)
        self.masking = Masking(
            probability=options.mask_probability or 0.15,
            mask_id=tokenizer.mask_token_id,
            words=[i for i in range(len(tokenizer)) if i not in special],
            keep=special,
            seed=options.seed,
        )
        fixed = replace(self.masking, seed=-1)
        held_out = range(_count(self.texts.held_out, self.width))
        self.held_out = _hidden(((i, self._window(self.texts.held_out, i)) for i in held_out), fixed)
        self.account = self.texts.account(count, len(self.held_out))

    def _window(self, stream: TokenStream, index: int) -> list[int]:
        """[CLS] tokens [SEP]; the stream's first token, which stands before its text, is left out."""
        start = 1 + index * self.width
        tokens = stream.tokens[start : start + self.width].tolist()
        return [self.frame[0], *tokens, self.frame[1]] if self.frame else tokens

    def inputs(self) -> list[Input]:
        """The next batch of windows, masked by their place in the data order."""
        place = self.order.position
        windows = [self._window(self.texts.train, i) for i in self.order.take(self.options.batch_size)]
        return _hidden(enumerate(windows, place), self.masking)

    def step(self, step: int) -> StepResult:
        """One batch of windows, one update."""
        started = time.perf_counter()
        inputs = self.inputs()
        metrics = self.update(step, self.batches(inputs), self.loss)
        metrics["num_tokens"] = float(metrics.pop("num_items"))
        tokens, seconds = sum(len(x.tokens) for x in inputs), time.perf_counter() - started
        return StepResult({**metrics, "tokens_per_second": tokens / seconds}, tokens)

    def loss(
        self, batch: ItemBatch, logits_NV: Tensor, *, smoothed: bool = True
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of every hidden token [N], and whether it is the likeliest guess."""
        logp_NV = log_softmax(logits_NV)
        share = self.options.label_smoothing if smoothed else 0.0
        mean_N = logp_NV.mean(-1) if share else None
        losses_N = nll(logp_NV.gather(1, batch.targets_N[:, None])[:, 0], share, mean_N)
        return losses_N, {"accuracy": logits_NV.detach().argmax(-1) == batch.targets_N}

    def evaluate(self, step: int) -> Evaluation | None:
        """Loss per hidden token, its exponential (no perplexity of the text), and the share guessed right."""
        total = right = count = 0.0
        with evaluating(self.encoder):
            for batch in self.batches(self.held_out):
                losses_N, metrics = self.loss(batch, item_logits(self.encoder, batch), smoothed=False)
                total, count = total + float(losses_N.double().sum()), count + len(batch.rows_N)
                right += float(metrics["accuracy"].sum())
        if not count:
            return None
        metrics = {
            "masked_perplexity": math.exp(min(total / count, 700.0)),
            "masked_accuracy": right / count,
            "eval_loss": total / count,
        }
        return Evaluation("masked_perplexity", metrics)

    def trained_on(self) -> tuple[Any, Iterator[Any]]:
        """The tokenizer, unless it is the run's own, and the text, for the fingerprint."""
        return None if self.options.new else self.tokenizer, iter([self.texts.corpus.sha256])


def _count(stream: TokenStream, width: int) -> int:
    return -(-(len(stream.tokens) - 1) // width)


def _hidden(windows: Iterable[tuple[int, list[int]]], masking: Masking) -> list[Input]:
    """Numbered windows with tokens hidden; one of special tokens alone has none to hide and is left out."""
    masked = [(window, *masking.apply(window, counter)) for counter, window in windows]
    return [Input(changed, [window[t] for t in places], places) for window, changed, places in masked if places]
