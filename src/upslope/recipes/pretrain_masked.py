"""Masked pretraining of an encoder (BERT; Devlin et al. 2019, arXiv 1810.04805, section 3.1, without the second task).

for each batch of windows, [CLS] tokens [SEP]:
    M      = each token with probability p, at least one            (data/masking.py)
    x'     = x with 80% of M as [MASK], 10% as another token, 10% left
    loss   = -sum_{t in M} log pi(x_t | x') / N                      N chosen tokens in the whole batch
    AdamW step on the float32 masters
which tokens are chosen depends on (seed, position in the data order), so every pass hides others
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from upslope.data.batching import PromptStream
from upslope.data.corpus import TokenStream
from upslope.data.masking import Masking
from upslope.errors import DataError, RunError
from upslope.functional.logprobs import log_softmax
from upslope.functional.supervised_losses import nll
from upslope.loop.session import Evaluation, StepResult
from upslope.loop.steps import in_steps
from upslope.models.encoder.network import Encoder
from upslope.options.pretrain import PretrainOptions
from upslope.recipes.encoder import Batch, Input, collate, groups_of, item_logits
from upslope.recipes.pretrain_start import load_texts
from upslope.runs.folder import Run
from upslope.training.optim import MasterAdamW, decay_groups
from upslope.training.schedule import rate_at
from upslope.training.step import evaluating

__all__ = ["MaskedPretrain"]


class MaskedPretrain:
    """Likelihood of hidden tokens; held out: the loss, its exponential and the share guessed right, masks fixed."""

    higher_is_better = False

    def __init__(self, options: PretrainOptions, encoder: Encoder, tokenizer: Any) -> None:
        self.encoder, self.tokenizer = encoder, tokenizer
        self.run: Run | None = None
        self.frame = [t for t in (tokenizer.cls_token_id, tokenizer.sep_token_id) if t is not None]
        self.frame = self.frame if len(self.frame) == 2 else []
        self.width = options.context_length - len(self.frame)
        limit = options.eval_samples * self.width if options.eval_samples else None
        self.texts = load_texts(options, tokenizer, max_eval_tokens=limit)
        count = _count(self.texts.train, self.width)
        if not count:
            raise DataError("the training text has no tokens: there is nothing to predict")
        self.options = options = in_steps(options, count)
        self.order = PromptStream(count, seed=options.seed)
        self.optimizer = MasterAdamW(
            decay_groups(encoder.named_parameters(), weight_decay=options.weight_decay), masters=encoder.masters
        )
        encoder.masters = {}
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
        rate = rate_at(self.options, step)
        self.encoder.train()
        metrics = self._update(self._batches(inputs), rate)
        tokens, seconds = sum(len(x.tokens) for x in inputs), time.perf_counter() - started
        return StepResult({**metrics, "learning_rate": rate, "tokens_per_second": tokens / seconds}, tokens)

    def _batches(self, inputs: Sequence[Input]) -> list[Batch]:
        groups = groups_of([len(x.tokens) for x in inputs], self.options.micro_batch_tokens)
        pad = self.tokenizer.pad_token_id
        return [collate([inputs[i] for i in group], self.encoder, pad) for group in groups]

    def _update(self, batches: Sequence[Batch], rate: float) -> dict[str, float]:
        """One optimizer step; on RunError (a loss or gradient that is not finite) nothing has changed."""
        count = sum(len(b.rows_N) for b in batches)
        totals = {"loss": 0.0, "accuracy": 0.0}
        self.optimizer.zero_grad()
        try:
            for batch in batches:
                losses_N, right = self._losses(batch)
                loss = losses_N.sum() / max(1, count)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise RunError(f"the loss is {value}: stopped before the update, the last checkpoint is untouched")
                loss.backward()
                totals["loss"] += value
                totals["accuracy"] += right / max(1, count)
            totals["grad_norm"] = self.optimizer.step(rate, max_norm=self.options.max_grad_norm)
        except RunError:
            self.optimizer.zero_grad()
            raise
        return {**totals, "num_tokens": float(count)}

    def _losses(self, batch: Batch, *, smoothed: bool = True) -> tuple[Tensor, int]:
        """Loss of every hidden token [N], and how many are the likeliest guess."""
        logits = item_logits(self.encoder, batch)
        logp_NV = log_softmax(logits)
        right = int((logits.detach().argmax(-1) == batch.targets_N).sum())
        share = self.options.label_smoothing if smoothed else 0.0
        mean_N = logp_NV.mean(-1) if share else None
        return nll(logp_NV.gather(1, batch.targets_N[:, None])[:, 0], share, mean_N), right

    def evaluate(self, step: int) -> Evaluation | None:
        """Loss per hidden token, its exponential (no perplexity of the text), and the share guessed right."""
        total = right = count = 0.0
        with evaluating(self.encoder):
            for batch in self._batches(self.held_out):
                losses_N, guessed = self._losses(batch, smoothed=False)
                total, right, count = total + float(losses_N.double().sum()), right + guessed, count + len(batch.rows_N)
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

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's moments; the weights are in the model folder."""
        return {"optimizer": self.optimizer.state()}

    def state(self) -> dict[str, Any]:
        """The data position."""
        return {"order": self.order.state_dict()}

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.optimizer.load(self.encoder.read(model), tensors["optimizer"])
        self.order.load_state_dict(state["order"])

    def write_model(self, folder: Path) -> None:
        """A folder that transformers loads by itself: float32 masters and the tokenizer."""
        self.encoder.save(folder, self.optimizer.weights(), self.tokenizer)


def _count(stream: TokenStream, width: int) -> int:
    return -(-(len(stream.tokens) - 1) // width)


def _hidden(windows: Iterable[tuple[int, list[int]]], masking: Masking) -> list[Input]:
    """Numbered windows with tokens hidden; one of special tokens alone has none to hide and is left out."""
    masked = [(window, *masking.apply(window, counter)) for counter, window in windows]
    return [Input(changed, [window[t] for t in places], places) for window, changed, places in masked if places]
