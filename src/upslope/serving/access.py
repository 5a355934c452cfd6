"""What every route needs: the service a request means, its tokens, its room, and answers that name the weights."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from upslope.serving.errors import ApiError, ClientGone, as_api_error
from upslope.serving.service import Service
from upslope.serving.stream import Stream

T = TypeVar("T")
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
    named = {**body, "system_fingerprint": service.fingerprint_of(version)}
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

    headers = {"X-Accel-Buffering": "no", "X-Weight-Version": str(service.version)}
    return _EventStream(closed(), streams, headers)
