"""One engine on a thread of its own. Event loops hand work over and are told what came out.

The thread alone touches the engine. Work is done in order, between two steps; while the engine is busy, a step follows
whatever has been handed over by then. What it brought forth goes back in one call per event loop, however many requests
it concerns.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Self, TypeVar

from upslope.engine import Engine, Event
from upslope.errors import RunError
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


class Stream(AsyncIterator[Event], AbstractAsyncContextManager):
    """The events of one request: `async for` reads them, `async with` frees the slot of one that is left early.

    What ended the request is raised: the engine's own error for it, RunError when the engine failed, Stopped.
    drop: frees what the request holds, called once when it is cancelled. streamed: whether every token is an event.
    """

    def __init__(self, drop: Callable[[Self], None], prompt_tokens: int, *, streamed: bool) -> None:
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

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        item = await self._items.get()
        error = item.error if isinstance(item, Event) else item
        if isinstance(item, Event) and error is None:
            return item
        self._done = True
        raise StopAsyncIteration if error is None else error

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


LATE = "the server is shutting down; send the request again elsewhere or later"
T = TypeVar("T")
log = logging.getLogger("upslope.serving")


class Stopped(RunError):
    """The service takes no more requests: it drains or has stopped."""


class EngineThread:
    """Made anywhere, started once, used from event loops.

    name: what is served, for messages. `observe` is called on the thread after each finished request.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self.observe: Callable[[Served], None] = lambda served: None
        self._streams: dict[int, Stream] = {}  # of the thread
        self._stepping = False  # of the thread: a step is among the work
        self._when_idle: list[Future[None]] = []  # of the thread: done when no request is left
        self._thread = ThreadPoolExecutor(1, f"engine of {name}")
        self._started = self._draining = self._ending = False
        self._failure: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether requests are being taken and answered."""
        return self._started and not self._draining and self._failure is None

    def start(self) -> None:
        """Begin to take requests."""
        self._started = True

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let the present ones finish for so long, end the others, end the thread."""
        self._draining = True
        if drain_seconds > 0:
            idle: Future[None] = Future()
            with suppress(RunError):  # it has failed or ended already
                self._post(lambda: self._when_idle.append(idle))
                await asyncio.wait([asyncio.wrap_future(idle)], timeout=drain_seconds)
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End the thread after the step it is in; what is unfinished gets Stopped."""
        self._draining = self._ending = True
        self._thread.shutdown()
        self._end_streams(Stopped("the server has shut down"))

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns on the engine's thread, between two steps; its error is raised here.

        RunError where the engine has failed; Stopped where it is not running.
        """
        return await asyncio.wrap_future(self._post(function))

    async def open(self, stream: Stream, add: Callable[[], int]) -> None:
        """Have `add`, called on the thread, give the engine a request, whose number it returns and `stream` gets."""

        def opened() -> None:
            stream.request_id = add()
            self._streams[stream.request_id] = stream

        if self._draining:
            raise Stopped(LATE)
        try:
            await self.call(opened)
        except asyncio.CancelledError:
            stream.cancel()
            raise

    def cancel(self, stream: Stream) -> None:
        """Free what a stream's request holds; nothing more comes out of it."""

        def dropped() -> None:
            with self._failing():
                self._drop(stream)

        with suppress(RunError):  # the thread is gone, and every request with it
            self._post(dropped)

    def _post(self, function: Callable[[], T]) -> Future[T]:
        self._check()
        try:
            return self._thread.submit(self._do, function)
        except RuntimeError as error:  # it has ended since the check
            raise Stopped(f"the engine of {self.name} is not running") from error

    def _check(self) -> None:
        if self._failure is not None:
            raise RunError(self._failure)
        if self._ending or not self._started:
            raise Stopped(f"the engine of {self.name} is not running")

    def _do(self, function: Callable[[], T]) -> T:
        """On the thread: a piece of work, unless all has ended while it waited."""
        self._check()
        try:
            return function()
        finally:
            self._go_on()

    def _step(self) -> None:
        self._stepping = False
        with self._failing():
            if not self._ending:
                self._deliver(self.engine.step())
        self._go_on()

    def _go_on(self) -> None:
        if self.engine.busy and not (self._stepping or self._ending or self._failure):
            self._stepping = True
            self._thread.submit(self._step)
        while self._when_idle and not self._streams:
            self._when_idle.pop().set_result(None)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """An error in here is the engine's end."""
        try:
            yield
        except BaseException as error:  # whatever it was, nobody may be left waiting
            log.exception("the engine of %s has failed", self.name)
            cause = str(error) or type(error).__name__
            self._failure = f"the engine of {self.name} has failed ({cause}); restart the server"
            self._end_streams(RunError(self._failure))

    def _drop(self, stream: Stream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self.engine.cancel(stream.request_id)

    def _deliver(self, events: list[Event]) -> None:
        """Hand a step's events to their streams, and an end to those whose request is over."""
        now = time.perf_counter()
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event | None]]] = {}
        touched: dict[int, Stream] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            touched[event.request_id] = stream
            stream.note(event, now)
            if stream.streamed or event.completion is not None or event.error is not None:
                batches.setdefault(stream.loop, []).append((stream, event))
        for request_id, stream in touched.items():
            if request_id not in self.engine.outputs.requests:
                del self._streams[request_id]
                batches.setdefault(stream.loop, []).append((stream, None))
                if stream.generated_tokens:
                    self.observe(stream.served(now))
        for loop, batch in batches.items():
            if not _hand_over(loop, batch):
                for stream, _ in batch:
                    self._drop(stream)

    def _end_streams(self, reason: Exception) -> None:
        while self._streams:
            _, stream = self._streams.popitem()
            _hand_over(stream.loop, [(stream, reason)])


def _hand_over(loop: asyncio.AbstractEventLoop, batch: Sequence[tuple[Stream, Event | Exception | None]]) -> bool:
    """Have the loop put each item into its stream soon; False when the loop is closed."""

    def put() -> None:
        for stream, item in batch:
            stream.put(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True
