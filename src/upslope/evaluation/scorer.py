"""Log-probs of given tokens by packed forward passes: no engine, no cache, the same bits in any batch on a CPU.

Requests with one context share its tokens, the longest go first, nothing is padded. The definitions are those of
lm-evaluation-harness, so that figures agree with it: what does not fit is cut from the left of the context, and the
first token of a text is predicted from the tokenizer's BOS (where it has none, from EOS).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from upslope.data.batching import collate, split_by_tokens
from upslope.errors import ConfigError, DataError, ModelError
from upslope.functional.logprobs import token_logprobs
from upslope.models.protocol import CausalModel, evaluating
from upslope.training.step import Forward
from upslope.types import Batch, Example

Request = tuple[Sequence[int], Sequence[int]]
"""(context tokens, continuation tokens); an empty context stands for the prefix token."""

_SLAB = 1024  # requests that are sorted by length together
_ROWS = 512  # rows whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-prob of every token of a continuation, in nats, and whether each was the most likely one."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        """Log-prob of the whole continuation."""
        return math.fsum(self.logprobs)


class Scorer:
    """Scores tokens under one model; the caller loads both.

    batch_tokens: of one forward pass (a longer request has one of its own). progress: called after each with (requests
    done, all requests of this call). `truncated` counts the contexts cut so far.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Any,
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.progress = progress or (lambda done, total: None)
        self.truncated = 0

    @property
    def prefix(self) -> int:
        """The token that predicts a text's first one: BOS, else EOS. ModelError where the tokenizer has neither."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError("the tokenizer has neither a BOS nor an EOS token, so nothing predicts a text's first token")

    def loglikelihood(self, requests: Iterable[Request]) -> list[tuple[float, bool]]:
        """(log-prob of the continuation in nats, whether greedy decoding would give it) of each request, in order.

        Raises as `score` does.
        """
        return [(scored.total, scored.greedy) for scored in self.score(requests)]

    def score(self, requests: Iterable[Request]) -> list[Scored]:
        """Every continuation token by token, in the order of the requests.

        The network reads at most max_positions tokens, so of context and continuation together the last
        max_positions + 1 count. DataError: an empty continuation, one that does not fit by itself, or what the model
        refuses as a prompt; ModelError: ids beyond the vocabulary, or log-probs that are not numbers.
        """
        requests = list(requests)
        return self._score(requests, len(requests))

    def _score(self, requests: Iterable[Request], total: int) -> list[Scored]:
        found: list[Scored] = []
        source = enumerate(requests)
        with evaluating(self.model):
            while slab := [self._taken(index, *request) for index, request in islice(source, _SLAB)]:
                scored: dict[int, Scored] = {}
                for part in self._batches(slab):
                    asked = [slab[i] for i in part]
                    examples = [Example([*c, *said], [False] * len(c) + [True] * len(said)) for c, said in asked]
                    batch = collate(examples, share_prompts=True, feed_last=False, device=self.model.device)
                    scored |= zip(part, self._run(batch, len(part)), strict=True)
                    self.progress(len(found) + len(scored), total)
                found += [scored[i] for i in range(len(slab))]
        return found

    def rolling(self, documents: Sequence[Sequence[int]], *, stride: int, context: int) -> list[list[float]]:
        """The log-prob of every token of each text, in nats; their windows are batched together.

        Windows of at most `context` tokens read; each after the first predicts the next `stride` tokens, so with
        stride = context the windows are disjoint (lm-evaluation-harness's definition) and a smaller stride gives
        every token more to look back on. ConfigError: not 1 <= stride <= context <= the model's max_positions.
        """
        if self.model.whole_prompts:
            raise ModelError("an encoder-decoder predicts a target from a source: it has no log-probs of plain text")
        if not 1 <= stride <= context <= self.model.spec.max_positions:
            raise ConfigError(
                f"stride {stride} and context {context} must satisfy 1 <= stride <= context <= the model's "
                f"{self.model.spec.max_positions} positions"
            )
        windows = [list(rolling_windows(len(tokens), stride, context)) for tokens in documents]
        texts = ([self.prefix, *tokens] for tokens in documents)
        requests = (
            (whole[start : first + 1], whole[first + 1 : end + 1])
            for whole, places in zip(texts, windows, strict=True)
            for start, first, end in places
        )
        counts = list(map(len, windows))
        scored = iter(self._score(requests, sum(counts)))
        return [[x for window in islice(scored, count) for x in window.logprobs] for count in counts]

    def _taken(self, index: int, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        kept, continuation = self.fitted(context, continuation, where=f"request {index}")
        self.truncated += len(kept) < len(context)
        return kept, continuation

    def fitted(self, context: Sequence[int], continuation: Sequence[int], *, where: str) -> tuple[list[int], list[int]]:
        """The request as it is fed: a context never empty, cut from the left where the two are too long.

        Raises as `score` does, beginning with `where`.
        """
        if not continuation:
            raise DataError(f"{where}: the continuation has no tokens, so it has no log-prob")
        context, continuation = list(context) or [self.prefix], list(continuation)
        for name, ids, size in (
            ("context", context, self.model.spec.input_vocab_size),
            ("continuation", continuation, self.model.spec.vocab_size),
        ):
            if min(ids) < 0 or max(ids) >= size:
                raise ModelError(
                    f"{where}: its {name} holds token {max(ids) if min(ids) >= 0 else min(ids)} but the model "
                    f"knows 0 to {size - 1}: the tokenizer is another model's"
                )
        room = self.model.room(len(context)) if self.model.whole_prompts else self.model.spec.max_positions
        if len(continuation) > room:
            raise DataError(
                f"{where}: a continuation of {len(continuation)} tokens does not fit the model's {room} "
                "positions: shorten it"
            )
        if self.model.whole_prompts:
            self.model.check_prompt(context)
            return context, continuation
        return context[-(room + 1 - len(continuation)) :], continuation

    def _batches(self, slab: list[tuple[list[int], list[int]]]) -> list[list[int]]:
        """Indices of the requests of each forward pass; those of one context stand together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(slab):
            groups.setdefault(tuple(context), []).append(i)
        units: list[list[int]] = []
        sizes: list[int] = []
        for context, members in groups.items():
            for position, i in enumerate(members):
                tokens = len(slab[i][1])
                if position == 0 or sizes[-1] + tokens > self.batch_tokens:
                    units.append([])
                    sizes.append(len(context))
                units[-1].append(i)
                sizes[-1] += tokens
        return [[i for u in part for i in units[u]] for part in split_by_tokens(sizes, self.batch_tokens)]

    def _run(self, batch: Batch, count: int) -> list[Scored]:
        hidden_ND = Forward(logp=False, hidden=True)(self.model, batch).hidden_ND
        assert hidden_ND is not None
        logps: list[Tensor] = []
        hits: list[Tensor] = []
        for rows_nD, targets_n in zip(hidden_ND.split(_ROWS), batch.targets_N.split(_ROWS), strict=True):
            logits_nV = self.model.logits(rows_nD)
            logps.append(token_logprobs(logits_nV, targets_n).cpu())
            hits.append((logits_nV.argmax(-1) == targets_n).cpu())
        logp_N, hit_N = torch.cat(logps), torch.cat(hits)
        if bool(logp_N.isnan().any()):
            raise ModelError("the model's log-probs are NaN: its weights are damaged or overflow this dtype")
        sizes = torch.bincount(batch.sequence_N, minlength=count).tolist()
        return [
            Scored(logp.tolist(), bool(hit.all()))
            for logp, hit in zip(logp_N.split(sizes), hit_N.split(sizes), strict=True)
        ]


def rolling_windows(length: int, stride: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end) of every window over a text of `length` tokens behind one prefix token.

    With `whole` = prefix, then the text: the window reads whole[start:end] and predicts whole[first + 1 : end + 1],
    the text's tokens first..end - 1. Every token is predicted once.
    """
    first, end = 0, min(context, length)
    while first < length:
        yield max(0, end - context), first, end
        first, end = end, min(end + stride, length)
