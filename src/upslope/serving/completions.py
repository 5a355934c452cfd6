"""/v1/completions: text after text."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from upslope.engine import Event
from upslope.serving.access import encode_all, event, event_stream, reply, room, service_of, usage, while_connected
from upslope.serving.bodies import CompletionBody
from upslope.serving.errors import ApiError
from upslope.serving.pieces import Offsets
from upslope.serving.sampling import best, sampling_params
from upslope.serving.service import Service
from upslope.serving.stream import Stream, merged
from upslope.types import Completion, SamplingParams

__all__ = ["router"]

router = APIRouter(tags=["completions"])
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its tokens, and its text (looked up when it is echoed, where the client sent tokens)."""

    tokens: list[int]
    text: str | None = None


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionBody) -> Response:
    """Continue a text, several texts, tokens, or several lists of tokens; each gives `n` choices."""
    service = service_of(request, body.model)
    if body.echo and service.engine.model.whole_prompts:
        raise ApiError(400, "echo: an encoder-decoder's prompt is not the beginning of its text", "echo")
    prompts = await _prompts(service, body)
    params = _params(service, body, prompts)
    if body.stream:
        streams = await _submit(service, body, prompts, params)
        return event_stream(service, _Chunks(service, body, prompts, streams).events(), *streams)
    answers = await while_connected(request, _complete(service, body, prompts, params))
    return _answer(service, body, prompts, answers)


async def _prompts(service: Service, body: CompletionBody) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if len(given) > service.capacity:
        raise ApiError(400, f"{len(given)} prompts in one request; at most {service.capacity} are taken", "prompt")
    special = body.add_special_tokens
    if isinstance(given[0], str):
        return [Prompt(*pair) for pair in zip(await encode_all(service, given, special=special), given, strict=True)]
    return [Prompt(one) for one in given]


def _params(service: Service, body: CompletionBody, prompts: Sequence[Prompt]) -> SamplingParams:
    for prompt in prompts:
        room(service, prompt.tokens, body.max_tokens)
    scored = (body.logprobs if body.max_tokens or body.logprobs else 0) if body.echo else None
    return sampling_params(
        body, service.vocab_size, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=scored
    )


async def _submit(
    service: Service, body: CompletionBody, prompts: Sequence[Prompt], params: SamplingParams
) -> list[Stream]:
    """One request of the engine per prompt. With a seed a prompt's text does not depend on its place in the list."""
    keys = range(len(prompts)) if body.seed is None else [0] * len(prompts)
    asked = zip(prompts, keys, strict=True)
    return await service.submit_all(
        [service.submit(prompt.tokens, params, key=key, stream=body.stream) for prompt, key in asked]
    )


async def _complete(
    service: Service, body: CompletionBody, prompts: Sequence[Prompt], params: SamplingParams
) -> list[list[Completion]]:
    streams = await _submit(service, body, prompts, params)
    try:
        return [await stream.completions() for stream in streams]
    finally:
        for stream in streams:
            stream.cancel()


def _answer(
    service: Service, body: CompletionBody, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]
) -> Response:
    choices: list[dict[str, Any]] = []
    for prompt, completions in zip(prompts, answers, strict=True):
        for completion in best(completions, body.n):
            choices.append(_choice(service, body, prompt, completion, len(choices)))
    every = [completion for completions in answers for completion in completions]
    counts = usage(sum(len(prompt.tokens) for prompt in prompts), sum(len(c.tokens) for c in every))
    answer = {**_head(body.model or service.name), "choices": choices, "usage": counts}
    return reply(service, answer, version=min(c.version for c in every))


def _head(model: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def _choice(
    service: Service, body: CompletionBody, prompt: Prompt, completion: Completion, index: int
) -> dict[str, Any]:
    before = _text_of(service, prompt) if body.echo else ""
    choice: dict[str, Any] = {
        "index": index,
        "text": before + completion.text,
        "logprobs": None if body.logprobs is None else _logprobs(service, body, prompt, completion),
        "finish_reason": completion.finish_reason,
    }
    if body.return_token_ids:
        choice |= {"token_ids": completion.tokens, "prompt_token_ids": prompt.tokens}
    return choice


def _text_of(service: Service, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return service.tokenizer.decode(prompt.tokens, skip_special_tokens=False)


def _logprobs(service: Service, body: CompletionBody, prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """Every token with its log-prob, the alternatives and its place in the text; the first of a prompt has none."""
    offsets = Offsets(service.pieces)
    tokens: list[int] = []
    own: list[float | None] = []
    top: list[dict[int, float] | None] = []
    places: list[int] = []
    if body.echo:
        assert completion.prompt_logprobs is not None
        tokens += prompt.tokens
        own += completion.prompt_logprobs
        top += completion.prompt_top_logprobs or [
            None if logprob is None else {token: logprob}
            for token, logprob in zip(prompt.tokens, completion.prompt_logprobs, strict=True)
        ]
        places += offsets.push(prompt.tokens, prompt=_text_of(service, prompt))
    assert completion.top_logprobs is not None
    return _listed(
        service,
        tokens + completion.tokens,
        own + completion.policy_logprobs,
        top + completion.top_logprobs,
        places + offsets.push(completion.tokens),
    )


def _listed(
    service: Service,
    tokens: Sequence[int],
    own: Sequence[float | None],
    top: Sequence[dict[int, float] | None],
    offsets: list[int],
) -> dict[str, Any]:
    pieces = service.pieces
    return {
        "tokens": [pieces.text(token) for token in tokens],
        "token_logprobs": [None if logprob is None else max(logprob, LEAST_LOGPROB) for logprob in own],
        "top_logprobs": [
            None if best is None else {t: max(p, LEAST_LOGPROB) for t, p in pieces.by_text(best).items()}
            for best in top
        ],
        "text_offset": offsets,
    }


class _Chunks:
    """The events of a streamed answer."""

    def __init__(
        self, service: Service, body: CompletionBody, prompts: Sequence[Prompt], streams: Sequence[Stream]
    ) -> None:
        self.service, self.body, self.prompts, self.streams = service, body, prompts, streams
        self.head = _head(body.model or service.name)
        self.with_usage = body.stream_options is not None and body.stream_options.include_usage
        self.offsets: dict[int, Offsets] = {}

    async def events(self) -> AsyncGenerator[str, None]:
        """A chunk per visible piece of text, and at the end, where it is asked for, the counts of tokens."""
        drawn = 0
        async with aclosing(merged(self.streams)) as arriving:
            async for place, happened in arriving:
                index = place * self.body.n + happened.sample
                if index not in self.offsets:
                    self.offsets[index] = Offsets(self.service.pieces)
                    if self.body.echo or self.body.return_token_ids:
                        yield self._beginning(index, self.prompts[place])
                if happened.completion is not None:
                    drawn += len(happened.completion.tokens)
                chunk = self._chunk(index, happened)
                if chunk is not None:
                    yield chunk
        if self.with_usage:
            counts = usage(sum(len(prompt.tokens) for prompt in self.prompts), drawn)
            yield event({**self.head, "choices": [], "usage": counts, "system_fingerprint": self.service.fingerprint})

    def _beginning(self, index: int, prompt: Prompt) -> str:
        text = _text_of(self.service, prompt) if self.body.echo else ""
        extra = {"prompt_token_ids": prompt.tokens, "token_ids": []} if self.body.return_token_ids else {}
        return self._event({"index": index, "text": text, "logprobs": None, "finish_reason": None, **extra})

    def _chunk(self, index: int, happened: Event) -> str | None:
        """The chunk of one event; None where there is nothing to tell yet."""
        ended, body = happened.completion, self.body
        detailed = body.logprobs is not None or body.return_token_ids
        if not (happened.text or ended is not None or detailed):
            return None
        choice: dict[str, Any] = {"index": index, "text": happened.text, "logprobs": None, "finish_reason": None}
        if ended is not None:
            choice["finish_reason"] = ended.finish_reason
        tokens = [] if happened.token is None else [happened.token]
        if body.logprobs is not None:
            places = self.offsets[index].push(tokens)
            listed = [happened.top_logprobs] if tokens else []
            own = [happened.policy_logprob] if tokens else []
            choice["logprobs"] = _listed(self.service, tokens, own, listed, places)
        if body.return_token_ids:
            choice["token_ids"] = ended.tokens if ended is not None and body.use_beam_search else tokens
        return self._event(choice)

    def _event(self, choice: dict[str, Any]) -> str:
        counted = {"usage": None} if self.with_usage else {}
        return event({**self.head, "choices": [choice], "system_fingerprint": self.service.fingerprint, **counted})
