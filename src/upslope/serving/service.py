"""One model to be asked by many: its engine on a thread, its tokenizer, its queue, and weights that can be replaced."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, TypeVar

from upslope.data.chat import encode_text
from upslope.data.pairs import PairTokenizer
from upslope.data.pieces import encode_pieces
from upslope.devices.hardware import apart
from upslope.engine import Engine, TokenMask
from upslope.errors import ModelError, RunError
from upslope.serving.constraints import Grammars
from upslope.serving.engine_thread import LATE, EngineThread, Stopped
from upslope.serving.pieces import Pieces
from upslope.serving.stream import Stream
from upslope.serving.weights import Loaded, copy_weights, read_fitting
from upslope.types import SamplingParams

T = TypeVar("T")
_SMALL, _LARGE = 2048, 65_536  # characters: less is done sooner than handed over; more may take a second


class QueueFull(RunError):
    """As many requests wait as may; another one may be sent in a while."""


class Service(EngineThread):
    """One model to be asked by many. Made anywhere, started once, used from event loops.

    name: as in /v1/models. source: where the weights came from, as the user said it. load: reads a model and its
    tokenizer from such a source; without it `swap` is refused. max_queue: requests that may wait for a free row of
    the engine's batch. target: the tokenizer of what is drawn (an encoder-decoder has one for each side).
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
        super().__init__(name, engine)
        self.tokenizer, self.source, self.max_queue = tokenizer, source, max_queue
        self.created = int(time.time())
        self.target = tokenizer.target if isinstance(tokenizer, PairTokenizer) else tokenizer
        self.pieces = Pieces(self.target)
        self.prompt_tokens = 0
        self._load = load
        self._swapping = asyncio.Lock()
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

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for the model's tokens."""
        return Grammars(self.tokenizer, self.vocab_size, self.engine.eos_token_ids)

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

    def end(self) -> None:
        """End all threads, the engine's after the step it is in; what is unfinished gets Stopped."""
        super().end()
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
            raise Stopped(LATE) from error
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

        def add() -> int:
            scheduler = self.engine.scheduler
            free = max(0, scheduler.max_batch - sum(1 + seq.forks for seq in scheduler.running))
            if self.waiting - free >= self.max_queue:
                raise QueueFull(f"{self.max_queue} requests wait already; send the request again in a while")
            request = self.engine.add(prompt_tokens, params, key=key, token_mask=token_mask, stream=stream)
            self.prompt_tokens += len(prompt_tokens)
            return request

        made = Stream(self.cancel, len(prompt_tokens), streamed=stream)
        await self.open(made, add)
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

    async def swap(self, source: str) -> int:
        """Take the weights of another folder of the same network, without dropping a request; their version.

        They are read and checked beside the running engine, then copied in between two steps. Requests go on under
        the new weights. UpslopeError or OSError where they cannot be read or do not fit: the old ones stay.
        """
        if self._load is None:
            raise ModelError(f"{self.name}: its weights cannot be replaced: it was started without a way to load some")
        read = partial(read_fitting, self._load, source, self.engine, self.tokenizer)

        def replace(loaded: Loaded) -> int:
            copy_weights(loaded.model, self.engine.model)
            self.engine.set_version(self.engine.version + 1)
            self.source = source
            return self.engine.version

        async with self._swapping:
            loaded = await asyncio.to_thread(apart, read)
            return await self.call(lambda: replace(loaded))
