"""One model to be asked by many: its engine on a thread, its tokenizer, its queue.

Its weights can be replaced while it runs: new ones are read, found to fit, copied in.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

from upslope.data.chat import encode_text
from upslope.data.pieces import PairTokenizer, encode_pieces
from upslope.devices.hardware import apart
from upslope.engine import Engine, TokenMask
from upslope.errors import ModelError, RunError, UpslopeError
from upslope.models.files.weights import check_shapes
from upslope.models.protocol import CausalModel
from upslope.serving.engine_thread import LATE, EngineThread, Stopped, Stream
from upslope.serving.vocabulary import Grammars, Pieces
from upslope.types import SamplingParams

log = logging.getLogger("upslope.serving")

# Keys of a configuration that say nothing about what the network computes.
_ACCIDENTAL = frozenset(
    {"_name_or_path", "architectures", "dtype", "initializer_range", "torch_dtype", "transformers_version", "use_cache"}
)


class Loaded(Protocol):
    """A network read from somewhere, with its tokenizer."""

    model: CausalModel
    tokenizer: Any

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""
        ...


def read_fitting(load: Callable[[str], Loaded], source: str, engine: Engine, tokenizer: Any) -> Loaded:
    """What `load` reads from the source, when it can take the place of the engine's network.

    UpslopeError or OSError where it cannot be read or does not fit.
    """
    try:
        loaded = load(source)
        _check_fits(loaded, engine, tokenizer, source)
        return loaded
    except (UpslopeError, OSError):
        raise
    except Exception as error:  # whatever a broken folder makes the libraries raise, bare Exceptions too
        log.error("new weights cannot be read", exc_info=error)
        raise ModelError(f"{source}: no model can be read from it: {type(error).__name__}: {error}") from error


def _check_fits(loaded: Loaded, engine: Engine, tokenizer: Any, source: str) -> None:
    """Raise ModelError where the loaded weights are not of the same network, vocabulary and ends of a turn."""
    model = engine.model
    if type(loaded.model) is not type(model):
        raise ModelError(f"{source}: a {type(loaded.model).__name__}, but a {type(model).__name__} is being served")
    shapes = [{name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, loaded.model)]
    check_shapes(shapes[0], shapes[1], where=f"{source} in place of the model being served")
    ours, theirs = _meaning(model), _meaning(loaded.model)
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        raise ModelError(f"{source}: its config.json differs from the served model's in {', '.join(changed)}")
    if _vocabularies(loaded.tokenizer) != _vocabularies(tokenizer):
        raise ModelError(f"{source}: its tokenizer has another vocabulary than the served model's")
    if set(loaded.eos_token_ids) != engine.eos_token_ids:
        raise ModelError(
            f"{source}: its turns end at tokens {sorted(loaded.eos_token_ids)}, the served model's at "
            f"{sorted(engine.eos_token_ids)}; start a server with it"
        )


def _vocabularies(tokenizer: Any) -> list[dict[str, int]]:
    sides = [tokenizer.target, tokenizer.source] if isinstance(tokenizer, PairTokenizer) else [tokenizer]
    return [side.get_vocab() for side in sides]


def _meaning(model: Any) -> dict[str, Any]:
    config = model.config.to_hf() if hasattr(model.config, "to_hf") else model.config.to_dict()
    return {key: value for key, value in config.items() if key not in _ACCIDENTAL}


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

    def fingerprint(self, version: int | None = None) -> str:
        """Model and weights in one word, `name@version`; None: the present ones."""
        return f"{self.name}@{self.version if version is None else version}"

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence: the model's context, or the whole cache where that is smaller."""
        pool = self.engine.pool
        return min(self.engine.model.spec.max_positions, pool.num_blocks * pool.block_size)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for the model's tokens."""
        return Grammars(self.tokenizer, self.engine.model.spec.vocab_size, self.engine.eos_token_ids)

    def tokens_of(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a prompt as training has them; without the tokenizer's BOS unless `special`. Never two of it.

        An encoder-decoder's prompt is always whole: its source, the source's end, and the target's beginning.
        """
        if isinstance(self.tokenizer, PairTokenizer):
            return self.tokenizer.source_ids(text)
        return encode_text(self.tokenizer, text) if special else encode_pieces(self.tokenizer, text, ())[0]

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may follow a prompt of so many."""
        model, most = self.engine.model, self.max_positions
        return min(model.room(prompt_tokens), most) if model.whole_prompts else most - prompt_tokens

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
            return await asyncio.get_running_loop().run_in_executor(self._lanes[size > _LARGE], function, *arguments)
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
            self.engine.model.load_state_dict(loaded.model.state_dict())  # in place
            self.engine.set_version(self.engine.version + 1)
            self.source = source
            return self.engine.version

        async with self._swapping:
            return await self.call(partial(replace, await asyncio.to_thread(apart, read)))
