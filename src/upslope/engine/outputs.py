"""What a step brings forth: tokens drawn, groups split, text as it arrives, stops found, completions handed out."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from upslope.engine.request import Beam, Event, Request, Sequence
from upslope.engine.runner import Runner
from upslope.engine.sampling import Row, beam_candidates, sample, uniforms
from upslope.engine.scheduler import Scheduler
from upslope.errors import DataError, ModelError, UpslopeError
from upslope.types import FinishReason


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens; bytes that are no whole character become U+FFFD."""
        ...


class TextStream:
    """The text of one completion while its tokens arrive: whole characters, stop strings across token borders.

    `text` ends before the first stop string. `take` hands out what can no longer change: bytes of an unfinished
    character and a tail that may become a stop string are held back until they are decided or the end has come;
    the pieces taken add up to `text`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, so that a word's first token keeps its leading space
        self._read = 0  # tokens whose text is in `text`
        self._context_text = ""
        self._taken = 0
        self._final = False

    def push(self, tokens: list[int], *, final: bool = False) -> bool:
        """Add tokens; True when a stop string has been completed. `final` flushes what was held back."""
        if self.stopped:
            return True
        self._final = final
        self._ids += tokens
        window = self.tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)
        if not window.endswith("\ufffd") or final:
            self._append(window[len(self._context_text) :])
        return self.stopped

    def take(self) -> str:
        """The newly decided text since the last call."""
        end = len(self.text) if self._final or self.stopped else len(self.text) - self._held()
        piece, self._taken = self.text[self._taken : end], max(self._taken, end)
        return piece

    def _append(self, piece: str) -> None:
        if piece:
            self._context, self._read = self._read, len(self._ids)
            self._context_text = self.tokenizer.decode(self._ids[self._context : self._read], skip_special_tokens=True)
        before = len(self.text)
        self.text += piece
        hits = [self.text.find(s, max(0, before - len(s) + 1)) for s in self.stop]
        found = [hit for hit in hits if hit >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max((len(s) for s in self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(len(s) > length and s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0


class OutputProcessor:
    """The unfinished requests and how their next tokens come about; `version` numbers the present weights."""

    def __init__(self, scheduler: Scheduler, runner: Runner, tokenizer: Tokenizer | None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokenizer = tokenizer
        self.version = 0
        self.requests: dict[int, Request] = {}
        self.beams: dict[int, Beam] = {}

    def draw(self, ready: list[Sequence], logits: Tensor) -> list[Event]:
        """Draw a token for every ready sequence, splitting groups whose prompt is done; beams take their own way."""
        samples, beams, index = [], [], []
        for i, seq in enumerate(ready):
            if seq.request.id in self.beams:
                beams.append((i, seq))
                continue
            group = [seq, *self._split(seq)]
            samples += group
            index += [i] * len(group)
        events = self._draw_samples(samples, logits if index == list(range(len(ready))) else logits[index])
        if beams:
            events += self._draw_beams([seq for _, seq in beams], logits[[i for i, _ in beams]])
        return events

    def cancel(self, request: Request) -> list[Event]:
        """Hand out what a request's unfinished samples have, and drop it."""
        unfinished = self.scheduler.sequences(request)
        if request.id not in self.beams:
            unfinished += [first.child(i) for first in unfinished[:1] for i in range(1, first.forks + 1)]
        first = sorted(unfinished, key=lambda s: s.sample)[: request.params.n]
        events = [self._finished(seq, "cancelled") for seq in first]
        self._drop(request)
        return events

    def _split(self, seq: Sequence) -> list[Sequence]:
        """The other samples of a group, sharing the prompt that `seq` has just brought into the cache."""
        children = [seq.child(seq.sample + i) for i in range(1, seq.forks + 1)]
        seq.forks = 0
        for child in children:
            self.scheduler.fork(seq, child)
        return children

    def _draw_samples(self, seqs: list[Sequence], logits: Tensor) -> list[Event]:
        events = [self._end(seq, "length") for seq in seqs if not seq.request.limit]
        rows, failed = self._rows(seqs)
        drawn = sample(logits, rows)
        for i, seq in enumerate(seqs):
            if seq.request.id not in self.requests or not seq.request.limit:
                continue
            numbers = drawn.tokens[i], drawn.sampling_logprobs[i], drawn.policy_logprobs[i]
            error = failed.get(seq.request.id) or _bad_row(*numbers[1:])
            if error is not None:
                events.append(self._fail(seq, error))
                continue
            seq.append(*numbers, self.version)
            if drawn.top_logprobs[i] is not None:
                seq.top_logprobs.append(drawn.top_logprobs[i])
            self.runner.stats.generated_tokens += 1
            events.append(self._emit(seq))
        return events

    def _rows(self, seqs: list[Sequence]) -> tuple[list[Row], dict[int, UpslopeError]]:
        """What each sequence is drawn with, and the requests whose token mask failed."""
        requests = [seq.request for seq in seqs]
        numbers = uniforms(
            [r.params.seed for r in requests],
            [r.key for r in requests],
            [r.first_sample + seq.sample for r, seq in zip(requests, seqs, strict=True)],
            [seq.num_generated for seq in seqs],
        )
        rows, failed = [], {}
        for seq, uniform in zip(seqs, numbers.tolist(), strict=True):
            params = seq.request.params
            row = Row(params, uniform, generated=seq.generated if params.counted else [])
            if params.repetition_penalty != 1.0:
                row.history = seq.generated if self.runner.model.whole_prompts else seq.tokens
            if seq.request.token_mask is not None:
                try:
                    row.allowed = self._allowed(seq)
                except DataError as error:
                    failed[seq.request.id] = error
            rows.append(row)
        return rows, failed

    def _allowed(self, seq: Sequence) -> Tensor | None:
        """The token mask's answer as bool [V]; DataError when it raises or allows nothing."""
        request, vocab = seq.request, self.runner.model.spec.vocab_size
        assert request.token_mask is not None
        try:
            answer = request.token_mask(list(request.prompt), seq.generated)
            if answer is None:
                return None
            given = torch.as_tensor(answer, device=self.runner.model.device)
            if given.dtype == torch.bool:
                allowed = given.reshape(vocab)
            else:
                allowed = torch.zeros(vocab, dtype=torch.bool, device=self.runner.model.device)
                allowed[given.long()] = True
        except Exception as error:  # user code: whatever it raises ends this request and no other
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"the token mask of request {request.id} failed: {what}") from error
        if not bool(allowed.any()):
            raise DataError(f"the token mask of request {request.id} allows no token after {seq.num_generated} tokens")
        return allowed

    def _draw_beams(self, seqs: list[Sequence], logits: Tensor) -> list[Event]:
        rows, failed = self._rows(seqs)
        wanted = [self.beams[seq.request.id].candidates_wanted for seq in seqs]
        events: list[Event] = []
        for seq, found in zip(seqs, beam_candidates(logits, rows, wanted), strict=True):
            request = seq.request
            if request.id not in self.requests:
                continue
            error = failed.get(request.id) or (None if found else _bad_row(math.nan, math.nan))
            if error is not None:
                events.append(self._fail(seq, error))
                continue
            beam = self.beams[request.id]
            seq.forks = 0
            if not beam.report(seq, found):
                continue
            old, born = beam.advance(self.version)
            for parent, child in born:
                self.scheduler.fork(parent, child)
            for parent in old:
                self.scheduler.remove(parent)
            self.runner.stats.generated_tokens += len(born)
            if not beam.live:
                for place, (winner, reason) in enumerate(beam.best()):
                    winner.sample = place
                    events.append(self._finished(winner, reason))
                self._drop(request)
        return events

    def _emit(self, seq: Sequence) -> Event:
        """The event of a freshly drawn token, with the completion if it was the last."""
        request, token = seq.request, seq.tokens[-1]
        if self.tokenizer is not None and seq.text is None and (request.stream or request.params.stop):
            seq.text = TextStream(self.tokenizer, request.params.stop)
        if token in request.stop_ids or (seq.text is not None and seq.text.push([token])):
            return self._end(seq, "stop")
        if seq.num_generated >= request.limit:
            return self._end(seq, "length")
        text = seq.text.take() if request.stream and seq.text is not None else ""
        return Event(request.id, seq.sample, token, seq.policy_logprobs[-1], _last(seq.top_logprobs), text)

    def _end(self, seq: Sequence, reason: FinishReason) -> Event:
        """Take a finished sequence out of the engine."""
        event = self._finished(seq, reason)
        self.runner.finished(seq)
        self.scheduler.remove(seq)
        seq.request.open -= 1
        if not seq.request.open:
            self._drop(seq.request)
        return event

    def _finished(self, seq: Sequence, reason: FinishReason) -> Event:
        """The last event of a sample; the text leaves out the token that ended it."""
        text = piece = ""
        if self.tokenizer is not None:
            stream = seq.text or TextStream(self.tokenizer)
            ended = bool(seq.num_generated) and seq.tokens[-1] in seq.request.stop_ids
            rest = [] if seq.text is not None else seq.generated[: -1 if ended else None]
            if stream.push(rest, final=True) and reason == "length":
                reason = "stop"
            text, piece = stream.text, stream.take()
        completion = seq.completion(reason, text, self.version)
        token = seq.tokens[-1] if seq.num_generated and reason != "cancelled" else None
        logprob = _last(seq.policy_logprobs) if token is not None else None
        top = _last(seq.top_logprobs) if token is not None else None
        return Event(seq.request.id, seq.sample, token, logprob, top, piece, completion)

    def _fail(self, seq: Sequence, error: UpslopeError) -> Event:
        """End a request with an error; its cached values are not trusted again."""
        for member in self.scheduler.sequences(seq.request):
            self.runner.scrub(self.scheduler.discard(member))
        self._drop(seq.request)
        return Event(seq.request.id, seq.sample, error=error)

    def _drop(self, request: Request) -> None:
        for seq in self.scheduler.sequences(request):
            self.scheduler.remove(seq)
        self.beams.pop(request.id, None)
        self.requests.pop(request.id, None)


def _last(items: list[Any]) -> Any:
    return items[-1] if items else None


def _bad_row(sampling_logprob: float, policy_logprob: float) -> UpslopeError | None:
    """Why a token that was drawn with these log-probs is not a sample, if it is not."""
    if math.isnan(policy_logprob):
        return ModelError("the model's logits hold NaN or infinity: check the weights and the dtype")
    if math.isnan(sampling_logprob):
        return DataError("every token is excluded by logit_bias, token mask and the logits together")
    return None
