"""The generation engine: add requests, call `step` until they are done; `generate` and `stream` do it for you.

Every token comes with two log-probs. On a CPU they are bit for bit those of the trainer's packed forward pass,
whatever else is in the batch, however the prompt was shared, chunked, preempted or found in the prefix cache.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

import torch

from upslope.engine.outputs import OutputProcessor, Tokenizer
from upslope.engine.request import Beam, Event, Request, Sequence, TokenMask, check_params, check_prompt
from upslope.engine.runner import Runner, Stats
from upslope.engine.scheduler import BlockPool, Scheduler
from upslope.errors import ConfigError
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.decoder.fast import Activations
from upslope.models.protocol import CausalModel
from upslope.types import Completion, SamplingParams


class Engine:
    """Continuous batching over a block cache for one model on one device. Not thread-safe: one caller at a time.

    model: its weights are read where they are; after changing them call `set_version`. tokenizer: needed for text
    and stop strings only. eos_token_ids: end every request that does not say ignore_eos. max_batch: rows decoded
    together. num_blocks, or as many blocks of 64 tokens as fit kv_cache_gb (GiB). prefill_tokens: prompt tokens per
    step. prefix_cache is off for an encoder-decoder, whose prompts mean nothing in parts. ConfigError where these make
    no sense.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None = None,
        *,
        eos_token_ids: Items[int] = (),
        max_batch: int = 64,
        kv_cache_gb: float = 1.0,
        num_blocks: int | None = None,
        prefill_tokens: int = 4096,
        prefix_cache: bool = True,
    ) -> None:
        if num_blocks is None:
            num_blocks = int(kv_cache_gb * 2**30 // KVCache.bytes_per_block(model.spec, model.dtype))
        for name, value in (("max_batch", max_batch), ("num_blocks", num_blocks), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ConfigError(f"engine option {name} = {value}: must be at least 1 (is kv_cache_gb too small?)")
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.runner = Runner(model, num_blocks, max_batch)
        whole = model.whole_prompts
        self.pool = BlockPool(num_blocks, BLOCK, prefix_cache=prefix_cache and not whole)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, prefill_tokens=prefill_tokens, whole_prompts=whole)
        self.outputs = OutputProcessor(self.scheduler, self.runner, tokenizer)
        self._requests = self.outputs.requests
        self._next_id = 0
        self._inbox: dict[int, deque[Event]] = {}
        self._unclaimed: list[Event] = []

    @property
    def stats(self) -> Stats:
        """Counts and seconds since the engine was made."""
        stats = self.runner.stats
        stats.preemptions, stats.cached_tokens = self.scheduler.preemptions, self.scheduler.reused_tokens
        return stats

    @property
    def version(self) -> int:
        """Number of the weights that tokens are drawn from now."""
        return self.outputs.version

    @property
    def busy(self) -> bool:
        """True while a request is unfinished or an event has not been collected."""
        return bool(self._requests or self._unclaimed)

    def set_version(self, version: int) -> None:
        """The weights changed: forget cached prefixes and recompute what is running.

        A completion that has tokens from both sides of the change gets `mixed_versions` and keeps the older number.
        """
        self.outputs.version = version
        self.runner.weights_changed()
        self.scheduler.restart()
        for seq in self.scheduler.everyone:
            seq.mixed_versions = seq.mixed_versions or seq.num_generated > 0
            if seq.request.needs_prompt_scores:
                seq.request.prompt_logprobs = [None] * len(seq.request.prompt)

    @contextmanager
    def keeping(self, activations: Activations | None) -> Iterator[None]:
        """Put the activations of every token that is fed inside the block into `activations`, where there are any.

        Each prompt is then computed as a whole: nothing of it is taken from the prefix cache.
        """
        cached = self.pool.prefix_cache
        if activations is not None:
            self.runner.activations, self.pool.prefix_cache = activations, False
        try:
            yield
        finally:
            self.runner.activations, self.pool.prefix_cache = None, cached

    def sleep(self) -> None:
        """Give back the memory of the cache and of the packed weights until the next request, as training wants it.

        RuntimeError while a request is unfinished.
        """
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are unfinished: an engine sleeps only when it is idle")
        self.scheduler.restart()
        self.runner.sleep()

    def add(
        self,
        prompt_tokens: Items[int],
        params: SamplingParams,
        *,
        key: int = 0,
        sample: int = 0,
        token_mask: TokenMask | None = None,
        stream: bool = False,
    ) -> int:
        """Queue a request of `params.n` samples; returns its id.

        (seed, key, sample + i, position) alone determine the random number of each token of sample i. `token_mask`
        is called before each token with (prompt, generated). The completion ends with "length" when the context is
        full, too. ConfigError: bad parameters, or more tokens than the block pool holds; DataError: bad prompt.
        """
        spec = self.model.spec
        check_params(params, spec.vocab_size)
        prompt = check_prompt(prompt_tokens, spec.input_vocab_size, spec.max_positions)
        self.model.check_prompt(prompt)
        if params.prompt_logprobs is not None and self.model.whole_prompts:
            raise ConfigError("sampling option prompt_logprobs: an encoder-decoder does not predict its prompt")
        if params.stop and self.tokenizer is None:
            raise ConfigError(f"sampling option stop = {params.stop!r} needs an engine with a tokenizer")
        limit = min(params.max_tokens, self.model.room(len(prompt)))
        needed = self.pool.blocks_for(len(prompt) + max(limit - 1, 0))
        if needed > self.pool.num_blocks:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with max_tokens = {limit} needs {needed} blocks of {BLOCK} tokens, "
                f"the cache has {self.pool.num_blocks}: lower max_tokens or raise kv_cache_gb"
            )
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        request = Request(self._next_id, prompt, params, limit, stop_ids, key, sample, token_mask, stream)
        self._next_id += 1
        self._requests[request.id] = request
        width = max(params.n, params.beam_width)
        first = Sequence(request, 0, list(prompt), forks=width - 1)
        if params.beam_width > 1:
            self.outputs.beams[request.id] = Beam(request, {0: (first, 0.0)})
        self.scheduler.add(first)
        return request.id

    def step(self) -> list[Event]:
        """Schedule, run, draw: one token for every running sequence. Returns what happened to whom."""
        self._advance()
        events, self._unclaimed = self._unclaimed, []
        return events

    def cancel(self, request_id: int) -> list[Event]:
        """Stop a request now; its unfinished samples come back as they are with finish_reason "cancelled"."""
        request = self._requests.get(request_id)
        return [] if request is None else self.outputs.cancel(request)

    def generate(
        self,
        prompts: Items[Items[int]],
        params: SamplingParams | Items[SamplingParams],
        *,
        keys: Items[int] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Complete every prompt: result[p][i] is sample i of prompt p (beams: best first).

        `keys` (default: the prompt's place) seed the sampling together with params.seed; `on_progress` is called with
        (finished samples, all samples). The first error of a request cancels the others and is raised.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        keys = range(len(prompts)) if keys is None else keys
        if len(each) != len(prompts) or len(keys) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts but {len(each)} sampling params and {len(keys)} keys")
        results: list[dict[int, Completion]] = [{} for _ in prompts]
        ids: dict[int, int] = {}
        total = sum(p.n for p in each)
        try:
            for place, (prompt, p, key) in enumerate(zip(prompts, each, keys, strict=True)):
                ids[self._open(prompt, p, key=key)] = place
            while any(i in self._requests for i in ids):
                self._advance()
                for request_id in ids:
                    for event in self._collect(request_id):
                        if event.completion is not None:
                            results[ids[request_id]][event.sample] = event.completion
                if on_progress is not None:
                    on_progress(sum(map(len, results)), total)
        finally:
            for request_id in ids:
                self._close(request_id)
        return [[found[i] for i in sorted(found)] for found in results]

    def stream(
        self,
        prompt_tokens: Items[int],
        params: SamplingParams,
        *,
        key: int = 0,
        sample: int = 0,
        token_mask: TokenMask | None = None,
    ) -> Iterator[Event]:
        """Yield the events of one request as they come; its text pieces add up to the completion's text.

        Closing the iterator cancels the request. Several streams may be read in turn; each advances all.
        """
        request_id = self._open(prompt_tokens, params, key=key, sample=sample, token_mask=token_mask, stream=True)
        return self._follow(request_id)

    def _follow(self, request_id: int) -> Iterator[Event]:
        try:
            while True:
                yield from self._collect(request_id)
                if request_id not in self._requests:
                    return
                self._advance()
        finally:
            self._close(request_id)

    def _open(self, prompt: Items[int], params: SamplingParams, **options: object) -> int:
        request_id = self.add(prompt, params, **options)  # type: ignore[arg-type]
        self._inbox[request_id] = deque()
        return request_id

    def _collect(self, request_id: int) -> Iterator[Event]:
        """Events of a request that generate or stream follows; its error is raised."""
        inbox = self._inbox[request_id]
        while inbox:
            event = inbox.popleft()
            if event.error is not None:
                raise event.error
            yield event

    def _close(self, request_id: int) -> None:
        self.cancel(request_id)
        self._inbox.pop(request_id, None)

    @torch.inference_mode()
    def _advance(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.chunks:
            assert not self._requests, "unfinished requests, but nothing to run"
            return
        ready, logits = self.runner.run(plan)
        self.scheduler.settle(plan)
        began = time.perf_counter()
        events = self.outputs.draw(ready, logits) if logits is not None else []
        self.stats.sample_seconds += time.perf_counter() - began
        for event in events:
            self._inbox.get(event.request_id, self._unclaimed).append(event)
