"""One model behind one engine on a thread of its own. The event loop hands work over and is told what came out.

The thread alone touches the engine. Work reaches it through an inbox that is emptied between two steps, in order;
what a step brought forth goes back in one call per event loop, however many requests it concerns.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from upslope.data.chat import encode_text
from upslope.data.pairs import PairTokenizer
from upslope.data.pieces import encode_pieces
from upslope.devices.threads import apart
from upslope.engine import Engine, Event, TokenMask
from upslope.errors import ModelError, RunError, UpslopeError
from upslope.serving.pieces import Pieces
from upslope.serving.stream import Served, Stream
from upslope.serving.weights import Loaded, check_fits, copy_weights
from upslope.types import SamplingParams

__all__ = ["QueueFull", "Served", "Service", "Stopped", "Stream"]

T = TypeVar("T")
_SMALL, _LARGE = 2048, 65_536  # characters: less is done sooner than handed over; more may take a second
log = logging.getLogger("upslope.serving")


class QueueFull(RunError):
    """As many requests wait as may; another one may be sent in a while."""


class Stopped(RunError):
    """The service takes no more requests: it drains or has stopped."""


class Service:
    """One model to be asked by many. Made anywhere, started once, used from event loops.

    name: as in /v1/models. source: where the weights came from, as the user said it. load: reads a model and its
    tokenizer from such a source; without it `swap` is refused. max_queue: requests that may wait for a free row of
    the engine's batch. target: the tokenizer of what is drawn (an encoder-decoder has one for each side). `observe` is
    called on the engine's thread after each finished request.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Any,
        *,
        source: str = "",
        load: Callable[[str], Loaded] | None = None,
        max_queue: int = 256,
    ) -> None:
        self.name, self.engine, self.tokenizer, self.source = name, engine, tokenizer, source
        self.max_queue = max_queue
        self.created = int(time.time())
        self.target = tokenizer.target if isinstance(tokenizer, PairTokenizer) else tokenizer
        self.pieces = Pieces(self.target)
        self.prompt_tokens = 0
        self.observe: Callable[[Served], None] = lambda served: None
        self._load = load
        self._swapping = asyncio.Lock()
        self._streams: dict[int, Stream] = {}  # of the engine's thread
        self._when_idle: list[Callable[[], None]] = []  # of the engine's thread
        self._inbox: deque[_Work] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._ending = False
        self._failure: Exception | None = None
        self._asides = 0
        self._lanes = [ThreadPoolExecutor(2, "light"), ThreadPoolExecutor(1, "heavy")]  # no small job waits for a big

    @property
    def version(self) -> int:
        """Number of the present weights: 0 at the start, one more after each swap."""
        return self.engine.version

    @property
    def fingerprint(self) -> str:
        """Model and weights in one word."""
        return self.fingerprint_of(self.version)

    def fingerprint_of(self, version: int) -> str:
        """`name@version`."""
        return f"{self.name}@{version}"

    @property
    def vocab_size(self) -> int:
        """Number of tokens that can be drawn."""
        return self.engine.model.spec.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence: the model's context, or the whole cache where that is smaller."""
        pool = self.engine.pool
        return min(self.engine.model.spec.max_positions, pool.num_blocks * pool.block_size)

    def tokens_of(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a prompt as training has them; without the tokenizer's BOS unless `special`. Never two of it.

        An encoder-decoder's prompt is always whole: its source, the source's end, and the target's beginning.
        """
        if isinstance(self.tokenizer, PairTokenizer):
            return self.tokenizer.source_ids(text)
        return encode_text(self.tokenizer, text) if special else encode_pieces(self.tokenizer, text, ())[0]

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may follow a prompt of so many."""
        if self.engine.model.whole_prompts:
            return min(self.engine.model.room(prompt_tokens), self.max_positions)
        return self.max_positions - prompt_tokens

    @property
    def running(self) -> int:
        """Sequences in the engine's batch."""
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests of which no token has been drawn and nothing runs."""
        return len({s.request.id for s in list(self.engine.scheduler.waiting) if not s.num_generated})

    @property
    def capacity(self) -> int:
        """Requests that can be here at one time."""
        return self.max_queue + self.engine.scheduler.max_batch

    @property
    def healthy(self) -> bool:
        """Whether requests are being taken and answered."""
        thread = self._thread
        return thread is not None and thread.is_alive() and not self._draining and self._failure is None

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"engine of {self.name}", daemon=True)
            self._thread.start()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let the present ones finish for so long, end the others, end the thread."""
        self._draining = True
        if self._thread is None or not self._thread.is_alive():
            return
        if drain_seconds > 0:
            loop = asyncio.get_running_loop()
            idle = loop.create_future()
            self._post(_Work(lambda: self._when_idle.append(lambda: _tell(loop, _settle, idle, None, None))))
            await asyncio.wait([idle], timeout=drain_seconds)
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End the thread after the step it is in; what is unfinished gets Stopped."""
        with self._wake:
            self._draining = self._ending = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)

    async def aside(self, function: Callable[..., T], *arguments: Any, size: int) -> T:
        """What a function returns, on a thread where `size`, in characters, says that the event loop would wait long.

        QueueFull where as many wait for that as may.
        """
        if size < _SMALL:
            return function(*arguments)
        if self._asides >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait to be read already; send the request again in a while")
        self._asides += 1
        try:
            lane = self._lanes[size > _LARGE]
            return await asyncio.get_running_loop().run_in_executor(lane, partial(function, *arguments))
        except RuntimeError as error:
            if not self._ending:
                raise
            raise Stopped("the server is shutting down; send the request again elsewhere or later") from error
        finally:
            self._asides -= 1

    async def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        *,
        key: int = 0,
        token_mask: TokenMask | None = None,
        stream: bool = False,
    ) -> Stream:
        """Queue a request; its events come out of the returned stream.

        With `stream` every token is an event; without, each finished sample is. Before anything has run: QueueFull;
        ConfigError or DataError for what the engine refuses; Stopped; RunError when the engine has failed.
        """
        made = Stream(self, len(prompt_tokens), streamed=stream)
        try:
            await self._ask(lambda: self._open(made, prompt_tokens, params, key, token_mask), new=True)
        except asyncio.CancelledError:
            made.cancel()
            raise
        return made

    async def submit_all(self, requests: Sequence[Awaitable[Stream]]) -> list[Stream]:
        """All of several `submit`s, between the same two steps; where one is refused the others are cancelled."""
        tasks = [asyncio.ensure_future(request) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Stream):
                    result.cancel()
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns on the engine's thread, between two steps; its error is raised here."""
        return await self._ask(function)

    async def swap(self, source: str) -> int:
        """Take the weights of another folder of the same network, without dropping a request; their version.

        They are read and checked beside the running engine, then copied in between two steps. Requests go on under
        the new weights. UpslopeError or OSError where they cannot be read or do not fit: the old ones stay.
        """
        if self._load is None:
            raise ModelError(f"{self.name}: its weights cannot be replaced: it was started without a way to load some")
        load = self._load

        def read() -> Loaded:
            try:
                loaded = load(source)
                check_fits(loaded, self.engine, self.tokenizer, source)
            except (UpslopeError, OSError):
                raise
            except Exception as error:  # whatever a broken folder makes the libraries raise, bare Exceptions too
                log.error("new weights cannot be read", exc_info=error)
                raise ModelError(f"{source}: no model can be read from it: {type(error).__name__}: {error}") from error
            return loaded

        async with self._swapping:
            loaded = await asyncio.to_thread(apart, read)
            return await self._ask(lambda: self._replace(loaded, source))

    def cancel(self, stream: Stream) -> None:
        """Free what a stream's request holds; nothing more comes out of it."""
        try:
            self._post(_Work(lambda: self._drop(stream)))
        except RunError:
            return  # the thread is gone, and every request with it

    async def _ask(self, function: Callable[[], T], *, new: bool = False) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if new and self._draining:
            raise Stopped("the server is shutting down; send the request again elsewhere or later")
        self._post(_Work(function, loop, future))
        return await future

    def _post(self, work: _Work) -> None:
        with self._wake:
            if self._failure is not None:
                raise RunError(f"the engine of {self.name} has failed ({self._failure}); restart the server")
            if self._ending or self._thread is None:
                raise Stopped(f"the engine of {self.name} is not running")
            self._inbox.append(work)
            self._wake.notify()

    def _run(self) -> None:
        """The thread: work, then a step, again and again; asleep while there is nothing of either."""
        reason: Exception = Stopped("the server has shut down")
        work: deque[_Work] = deque()
        try:
            while True:
                with self._wake:
                    while not (self._inbox or self.engine.busy or self._ending):
                        self._wake.wait()
                    if self._ending:
                        break
                    work, self._inbox = self._inbox, deque()
                while work:
                    work.popleft().do()
                if self.engine.busy:
                    self._deliver(self.engine.step())
                if not self._streams:
                    self._tell_idle()
        except BaseException as error:  # whatever it was, nobody may be left waiting
            log.exception("the engine of %s has failed", self.name)
            self._failure = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            reason = RunError(f"the engine of {self.name} has failed ({error}); restart the server")
            for undone in work:
                undone.fail(reason)
        with self._wake:
            self._ending = True
            left, self._inbox = self._inbox, deque()
        for undone in left:
            undone.fail(reason)
        for stream in self._streams.values():
            _tell(stream.loop, _hand_out, [(stream, reason)])
        self._streams.clear()
        self._tell_idle()

    def _tell_idle(self) -> None:
        for tell in self._when_idle:
            tell()
        self._when_idle.clear()

    def _open(
        self,
        stream: Stream,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        key: int,
        token_mask: TokenMask | None,
    ) -> None:
        scheduler = self.engine.scheduler
        free = max(0, scheduler.max_batch - sum(1 + seq.forks for seq in scheduler.running))
        if self.waiting - free >= self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait already; send the request again in a while")
        request_id = self.engine.add(prompt_tokens, params, key=key, token_mask=token_mask, stream=stream.streamed)
        stream.request_id = request_id
        self._streams[request_id] = stream
        self.prompt_tokens += len(prompt_tokens)

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
            if not _tell(loop, _hand_out, batch):
                for stream, _ in batch:
                    self._drop(stream)

    def _replace(self, loaded: Loaded, source: str) -> int:
        copy_weights(loaded.model, self.engine.model)
        self.engine.set_version(self.engine.version + 1)
        self.source = source
        return self.engine.version


@dataclass(slots=True)
class _Work:
    """A call to be made on the engine's thread, and the future (with its loop) that wants to know how it went."""

    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop | None = None
    future: asyncio.Future[Any] | None = None

    def do(self) -> None:
        try:
            result = self.function()
        except Exception as error:
            if self.future is None:
                raise
            self.fail(error)
        else:
            self._settle(result, None)

    def fail(self, error: Exception) -> None:
        self._settle(None, error)

    def _settle(self, result: Any, error: Exception | None) -> None:
        if self.loop is not None:
            _tell(self.loop, _settle, self.future, result, error)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> bool:
    """Have the loop call the function soon; False when it is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _hand_out(batch: Sequence[tuple[Stream, Event | Exception | None]]) -> None:
    for stream, item in batch:
        stream.put(item)
