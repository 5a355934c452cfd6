"""One engine on a thread of its own. Event loops hand work over and are told what came out.

The thread alone touches the engine. Work is done in order, between two steps; while the engine is busy, a step follows
whatever has been handed over by then. What it brought forth goes back in one call per event loop, however many requests
it concerns.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from upslope.engine import Engine, Event
from upslope.errors import RunError
from upslope.serving.stream import Served, Stream

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
