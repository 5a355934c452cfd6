"""What comes out of one request of a service, for those who wait for it on an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from upslope.engine import Event
from upslope.types import Completion


@dataclass(frozen=True, slots=True)
class Served:
    """What one finished request took: token counts over all its samples, seconds.

    token_seconds: the mean time between the tokens of its longest sample, None where that has fewer than two.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_seconds: float
    token_seconds: float | None


class Stream:
    """The events of one request: `async for` reads them, `async with` frees the slot of one that is left early.

    What ended the request is raised: the engine's own error for it, RunError when the engine failed, Stopped.
    drop: frees what the request holds, called once when it is cancelled. streamed: whether every token is an event.
    """

    def __init__(self, drop: Callable[[Stream], None], prompt_tokens: int, *, streamed: bool) -> None:
        self.streamed = streamed
        self.loop = asyncio.get_running_loop()
        self.request_id = -1
        self.num_prompt_tokens = prompt_tokens
        self.generated_tokens = 0
        self._drop = drop
        self._asked = time.perf_counter()
        self._first: float | None = None
        self._longest = 0
        self._items: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._done = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        item = await self._items.get()
        error = item.error if isinstance(item, Event) else item
        if isinstance(item, Event) and error is None:
            return item
        self._done = True
        raise StopAsyncIteration if error is None else error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def completions(self) -> list[Completion]:
        """Every sample's completion, by sample number (beams: best first), when all have finished."""
        found: dict[int, Completion] = {}
        async with self:
            async for event in self:
                if event.completion is not None:
                    found[event.sample] = event.completion
        return [found[sample] for sample in sorted(found)]

    def cancel(self) -> None:
        """Stop the request, if it runs, and free its slot."""
        if not self._done:
            self._done = True
            self._drop(self)

    def put(self, item: Event | Exception | None) -> None:
        """Add an event, the error that ended the request, or None for its end. Called on the stream's own loop."""
        if not self._done:
            self._items.put_nowait(item)

    def note(self, event: Event, now: float) -> None:
        """Count an event at its time. Called on the engine's thread."""
        if event.completion is not None:
            self.generated_tokens += len(event.completion.tokens)
            self._longest = max(self._longest, len(event.completion.tokens))
        if self._first is None and event.token is not None:
            self._first = now

    def served(self, now: float) -> Served:
        """What the request took, when it is over."""
        first = now if self._first is None else self._first
        pace = (now - first) / (self._longest - 1) if self._longest > 1 and first < now else None
        return Served(self.num_prompt_tokens, self.generated_tokens, first - self._asked, pace)


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Event], None]:
    """(place, event) of several streams as they come. The first error is raised; leaving early cancels all."""
    if len(streams) == 1:  # half the work per event, and most requests have one prompt
        async with streams[0] as stream:
            async for event in stream:
                yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()

    async def forward(place: int, stream: Stream) -> None:
        end: Exception | None = None
        try:
            async with stream:
                async for event in stream:
                    arrived.put_nowait((place, event))
        except Exception as error:
            end = error
        arrived.put_nowait((place, end))

    tasks = [asyncio.ensure_future(forward(place, stream)) for place, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            place, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield place, item
    finally:
        for task, stream in zip(tasks, streams, strict=True):
            task.cancel()
            stream.cancel()
