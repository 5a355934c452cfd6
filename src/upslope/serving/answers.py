"""What every route needs: the service a request means, its tokens, its room, and answers that name the weights.

What completions and chat have in common: a request is put to the engine, and answered whole or as it comes.
"""

import asyncio
import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Generic, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from upslope.engine import Event, TokenMask
from upslope.serving.bodies import SamplingBody
from upslope.serving.engine_thread import Stream, merged
from upslope.serving.errors import ApiError, ClientGone, as_api_error
from upslope.serving.service import Service
from upslope.types import Completion, SamplingParams

T = TypeVar("T")
B = TypeVar("B", bound=SamplingBody)
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def service_of(request: Request, name: str | None, *, guess: bool = True) -> Service:
    """The service of that name, of the first model where no name is given; the metrics count the request under it.

    ApiError 404 for another name; 400 for none where there are several models and it may not `guess`.
    """
    services: Mapping[str, Service] = request.app.state.services
    known = ", ".join(services)
    if name is None and len(services) > 1 and not guess:
        raise ApiError(400, f"several models are served here: say which one of {known}", "model", "model_missing")
    name = next(iter(services)) if name is None else name
    if name not in services:
        raise ApiError(404, f"no model {name[:80]!r} is served here, only {known}", "model", "model_not_found")
    before = getattr(request.state, "model", name)
    request.state.model = name if name == before else ""  # what concerns two models counts for none
    return services[name]


async def encode_all(service: Service, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """The tokens of several texts, made beside the event loop where there is much of it."""
    size = sum(len(text) + 64 for text in texts)
    return await service.aside(lambda: [service.tokens_of(text, special=special) for text in texts], size=size)


def room(service: Service, prompt: Sequence[int], max_tokens: int | None, param: str = "prompt") -> int:
    """The tokens a completion of that prompt may have: `max_tokens`, or all that fit where it is None.

    ApiError 400 with the code context_length_exceeded where prompt and completion do not fit together.
    """
    left = service.room(len(prompt))
    if left < max(max_tokens or 0, 1):
        wanted = "" if max_tokens is None else f" and max_tokens = {max_tokens}"
        raise ApiError(
            400,
            f"the model's context holds {service.max_positions} tokens, too few for a prompt of {len(prompt)}{wanted}"
            "; shorten the prompt or lower max_tokens",
            param,
            "context_length_exceeded",
        )
    return left if max_tokens is None else max_tokens


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled (ClientGone) when the client closes its connection."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def reply(service: Service, body: Mapping[str, Any], *, version: int | None = None) -> Response:
    """A JSON answer that names the weights: `system_fingerprint` in it and X-Weight-Version beside it."""
    version = service.version if version is None else version
    named = {**body, "system_fingerprint": service.fingerprint(version)}
    return JSONResponse(named, headers={"X-Weight-Version": str(version)})


def event(data: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {_COMPACT(data)}\n\n"


class _EventStream(StreamingResponse):
    """Ends its events and frees their slots when it ends, even where the client had gone before the first event."""

    def __init__(self, events: AsyncGenerator[str, None], streams: Sequence[Stream], headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._streams = events, streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self._streams:
                stream.cancel()
            await self._events.aclose()


def event_stream(service: Service, events: AsyncGenerator[str, None], *streams: Stream) -> Response:
    """Server-sent events made from `streams`, as they come, then [DONE].

    An error on the way becomes an event, in OpenAI's shape. A client that goes away cancels the streams.
    """

    async def closed() -> AsyncGenerator[str, None]:
        try:
            async with aclosing(events):
                async for one in events:
                    yield one
        except Exception as error:
            yield event(as_api_error(error).body)
        yield "data: [DONE]\n\n"

    return _EventStream(closed(), streams, {"X-Accel-Buffering": "no", "X-Weight-Version": str(service.version)})


_PENALTIES = {"length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_AS_GIVEN = _PENALTIES | {"temperature", "top_p", "min_p", "ignore_eos"}
Write = Callable[[Event], Iterator[dict[str, Any]]]
"""Event of a sample -> the choice objects that it leads to; none where there is nothing to tell yet."""


def sampling_params(
    body: SamplingBody,
    service: Service,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters that a body asks for; a seed is made up where it names none.

    ApiError 400 for a token outside the vocabulary, and for what beam search cannot honour.
    """
    vocab_size = service.engine.model.spec.vocab_size
    bias = {int(token): value for token, value in body.logit_bias.items()}
    for name, tokens in (("logit_bias", bias), ("stop_token_ids", body.stop_token_ids)):
        wrong = next((token for token in tokens if token >= vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{name}: token {wrong} is outside the vocabulary of {vocab_size} tokens", name)
    if body.use_beam_search:
        idle = {"top_k": body.top_k > 0, "top_p": body.top_p < 1, "min_p": body.min_p > 0, "stop": bool(body.stop)}
        name = next((name for name, given in (idle | {"logprobs": logprobs is not None}).items() if given), None)
        if name is not None:
            raise ApiError(400, f"{name} has no meaning with use_beam_search; leave it out", name)
        if body.best_of is None and body.n == 1:
            raise ApiError(400, "use_beam_search needs a width: give best_of (or n)", "best_of")
    return SamplingParams(
        max_tokens=max_tokens,
        n=body.n if body.use_beam_search else body.drawn,
        beam_width=body.drawn if body.use_beam_search else 1,
        top_k=max(body.top_k, 0),
        logit_bias=bias,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **body.model_dump(include=_AS_GIVEN),
    )


def best(completions: Sequence[Completion], n: int) -> list[Completion]:
    """The n completions with the highest mean log-prob per token, best first; all, in order, where there are n."""
    if len(completions) <= n:
        return list(completions)
    return sorted(completions, key=lambda c: -c.cumulative_logprob / max(len(c.tokens), 1))[:n]


class Answer(ABC, Generic[B]):
    """A request that has been understood: what the engine is given (one request of it per prompt), how it is answered.

    prefix: of the answer's id. kind, chunk_kind: the `object` of an answer, and of a part of a streamed one.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    mask: TokenMask | None = None

    def __init__(self, service: Service, body: B, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        self.service, self.body, self.prompts, self.params = service, body, prompts, params
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    @abstractmethod
    def choice(self, place: int, completion: Completion) -> dict[str, Any]:
        """A choice of the answer to the prompt at `place`, without its index."""

    @abstractmethod
    def writer(self, place: int, index: int) -> Write:
        """What writes the choice of that index, an answer to the prompt at `place`, as it comes."""

    async def respond(self, request: Request) -> Response:
        """Ask the engine, and answer."""
        if self.body.stream:
            streams = await self._submit()
            return event_stream(self.service, self._chunks(streams), *streams)
        found = await while_connected(request, self._completions())
        every = [completion for completions in found for completion in completions]
        return reply(self.service, self.whole(found), version=min(c.version for c in every))

    def whole(self, found: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from the completions of every prompt."""
        choices = [self.choice(place, c) for place, some in enumerate(found) for c in best(some, self.body.n)]
        answer = self._head(self.kind)
        answer["choices"] = [{"index": index, **choice} for index, choice in enumerate(choices)]
        answer["usage"] = self._usage(sum(len(c.tokens) for completions in found for c in completions))
        return answer

    def chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
        """The body of one event of a streamed answer."""
        fields = {"system_fingerprint": self.service.fingerprint(), "choices": choices}
        return self._head(self.chunk_kind) | fields | ({"usage": counts} if self.body.wants_usage else {})

    async def _submit(self) -> list[Stream]:
        """With a seed a prompt's text does not depend on its place in the list."""
        keys = range(len(self.prompts)) if self.body.seed is None else [0] * len(self.prompts)
        options = {"token_mask": self.mask, "stream": self.body.stream}
        asked = zip(self.prompts, keys, strict=True)
        return await self.service.submit_all(
            [self.service.submit(prompt, self.params, key=key, **options) for prompt, key in asked]
        )

    async def _completions(self) -> list[list[Completion]]:
        streams = await self._submit()
        try:
            return [await stream.completions() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    async def _chunks(self, streams: Sequence[Stream]) -> AsyncGenerator[str, None]:
        """The server-sent events, [DONE] excepted; at the end, where it is asked for, the counts of tokens."""
        writers: dict[int, Write] = {}
        drawn = 0
        async with aclosing(merged(streams)) as arriving:
            async for place, happened in arriving:
                index = place * self.body.n + happened.sample
                if index not in writers:
                    writers[index] = self.writer(place, index)
                for choice in writers[index](happened):
                    yield event(self.chunk([choice]))
                if happened.completion is not None:
                    drawn += len(happened.completion.tokens)
        if self.body.wants_usage:
            yield event(self.chunk([], self._usage(drawn)))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.service.name}

    def _usage(self, drawn: int) -> dict[str, int]:
        """The counts; everything that was drawn counts, the token that ended a text too."""
        given = sum(map(len, self.prompts))
        return {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}
