"""Runs a plan on the model: block copies, the packed forward calls, and the logits of the rows to draw from.

On CUDA a decoding step of some rows is captured once as a graph and replayed, so that no kernel waits for Python. A
graph reads tokens, positions and block tables from memory that stays where it is; only what changed is sent. Counts
of rows are rounded up, and the rows that fill up write to a block of the cache that nobody owns.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from upslope.engine.request import Sequence
from upslope.engine.sampling import policy_temperature, top_alternatives
from upslope.engine.scheduler import Chunk, Plan
from upslope.functional.logprobs import log_softmax
from upslope.kernels.products import PackedWeights
from upslope.models.attention.context import BLOCK, KVCache, PagedContext, fused_on
from upslope.models.decoder.fast import Activations, PreparedDecoder
from upslope.models.protocol import CausalModel, Context, Segment

_STEP = 16
_SCORED_ROWS = 128


class StepContext(Context):
    """One new token for each of T sequences: positions int64 [T], and the cache's blocks int32 [T, B] of each.

    Its tensors stay where they are, so that a captured CUDA graph can be replayed: what they hold when a call runs
    counts, not what they held when this was made. Not differentiable. B is the number of blocks of a table.
    """

    def __init__(self, cache: KVCache, positions_T: Tensor, tables_TB: Tensor) -> None:
        self.cache, self.positions_T, self.tables_TB = cache, positions_T, tables_TB
        rows = torch.arange(len(positions_T), dtype=torch.int32, device=positions_T.device)
        self.tiles_T4 = torch.stack([rows, rows, positions_T.to(torch.int32), torch.ones_like(rows)], dim=1)
        self.blocks_T = tables_TB.gather(1, (positions_T // BLOCK)[:, None])[:, 0].long()
        self.places_T = positions_T % BLOCK

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Not known here: they would have to be read back from the device."""
        raise TypeError("the segments of a captured step are not known to the host")

    def write(self, layer: int, k_TKd: Tensor, v_TKd: Tensor) -> None:
        """Put the call's keys and values of `layer` into the cache."""
        self.cache.keys[layer][self.blocks_T, :, self.places_T] = k_TKd
        self.cache.values[layer][self.blocks_T, :, self.places_T] = v_TKd

    def before(self, layer: int) -> tuple[Tensor, Tensor]:
        """Not offered: no network that can be captured asks for it."""
        raise TypeError("a captured step does not keep what stands before it")

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Put the new keys and values of `layer` into the cache, then attend to everything up to each query."""
        from upslope.kernels.paged_triton import paged_attention_gpu

        self.write(layer, k_TKd, v_TKd)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return paged_attention_gpu(q_THd, keys, values, self.tables_TB, self.tiles_T4, scale=scale, longest=1)


def can_capture(model: CausalModel) -> bool:
    """Whether this network's decoding steps can be captured: on CUDA, nothing read back in between."""
    return model.captures and fused_on(model.head_weight)


def rounded_rows(rows: int) -> int:
    """The rows of the graph that so many run in: powers of two, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= _STEP else -(-rows // _STEP) * _STEP


def captured(work: Callable[[], Tensor], pool: object) -> tuple[Callable[[], None], Tensor]:
    """`work` recorded on the current device after two runs of it: how to run it again, and where its result will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and libraries take their memory outside the recording
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph.replay, result


class DecodeGraphs:
    """A model's decoding steps over one cache, whose last block takes what the rows that fill up write.

    Valid while the model's weights and the cache lie where they are; changed in place, weights are read anew.
    `record`: how a step becomes something to run again.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        max_rows: int,
        record: Callable[[Callable[[], Tensor], object], tuple[Callable[[], None], Tensor]] = captured,
    ) -> None:
        self.model, self.cache, self.record = model, cache, record
        rows, device = rounded_rows(max_rows), cache.keys.device
        self._spare = cache.num_blocks - 1
        width = -(-model.spec.max_positions // BLOCK)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._tables = torch.full((rows, width), self._spare, dtype=torch.int32, device=device)
        self._known: list[list[int]] = [[] for _ in range(rows)]
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def step(self, tokens: Items[int], positions: Items[int], tables: Items[Items[int]]) -> Tensor:
        """Hidden states [n, D] of one token of each of n sequences; overwritten by the next step."""
        count = len(tokens)
        rows = rounded_rows(count)
        fill = rows - count
        numbers = torch.tensor([[*tokens, *[0] * fill], [*positions, *[0] * fill]])
        self._tokens[:rows].copy_(numbers[0])
        self._positions[:rows].copy_(numbers[1])
        self._send([*map(list, tables), *[[self._spare]] * fill])
        if rows not in self._graphs:
            where = self.cache, self._positions[:rows], self._tables[:rows]
            self._graphs[rows] = self.record(lambda: self.model(self._tokens[:rows], StepContext(*where)), self._pool)
        replay, hidden = self._graphs[rows]
        replay()
        return hidden[:count]

    def _send(self, tables: list[list[int]]) -> None:
        """Bring the tables on the device up to date."""
        changed = [row for row, table in enumerate(tables) if table != self._known[row]]
        if not changed:
            return
        width = max(len(tables[row]) for row in changed)
        padded = [[*tables[row], *[self._spare] * (width - len(tables[row]))] for row in changed]
        where = torch.tensor(changed, device=self._tables.device)
        self._tables[:, :width].index_copy_(0, where, torch.tensor(padded, dtype=torch.int32).to(where.device))
        for row in changed:
            self._known[row] = tables[row]


@dataclass(slots=True)
class Stats:
    """What the engine did since it was made: counts of tokens, wall-clock seconds.

    `prefill_tokens` were fed in chunks, `cached_tokens` were found in the prefix cache instead. The seconds of a call
    that does both are shared out by tokens. On an accelerator the work of `prefill_seconds` and `decode_seconds` may be
    waited for in `sample_seconds`.
    """

    steps: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sample_seconds: float = 0.0


class Runner:
    """The model and its block cache; `activations`, where set, takes those of every token that is fed."""

    def __init__(self, model: CausalModel, num_blocks: int, max_batch: int) -> None:
        self.model = model
        self.num_blocks, self.max_batch = num_blocks, max_batch
        self.packed = PackedWeights()
        self.stats = Stats()
        self.activations: Activations | None = None

    @cached_property
    def cache(self) -> KVCache:
        """Keys and values; allocated when first used, with a spare block where steps are captured."""
        model, blocks = self.model, self.num_blocks + int(can_capture(self.model))
        return KVCache(model.spec, blocks, dtype=model.dtype, device=model.device)

    @cached_property
    def prepared(self) -> PreparedDecoder | None:
        """What stands for the model's own pass over cached sequences, where it can; made when first used."""
        return PreparedDecoder.of(self.model, self.packed)

    @cached_property
    def graphs(self) -> DecodeGraphs:
        """Captured decoding steps; made when first used."""
        return DecodeGraphs(self.model, self.cache, self.max_batch)

    def sleep(self) -> None:
        """Give back the cache and what was made of the weights until they are used again."""
        self.weights_changed()
        self.__dict__.pop("cache", None)

    def weights_changed(self) -> None:
        """Forget what was made of the weights: copies laid out for decoding, the prepared pass, captured steps."""
        self.packed.clear()
        for made in ("prepared", "graphs"):
            self.__dict__.pop(made, None)

    def run(self, plan: Plan) -> tuple[list[Sequence], Tensor | None]:
        """Feed the plan's tokens; the sequences that can draw now, with their logits [N, V] (None where N is 0)."""
        self.stats.steps += 1
        self.cache.copy_blocks(plan.copies)
        # One call reads the weights once; a network that treats prompts apart gets them apart.
        calls = (plan.prefill, plan.decode) if self.model.whole_prompts else (plan.chunks,)
        hidden = []
        for chunks in filter(None, calls):
            began = time.perf_counter()
            hidden.append(self._forward(chunks))
            seconds = time.perf_counter() - began
            share = sum(c.count for c in chunks if c.count > 1) / sum(c.count for c in chunks)  # of the prompts' tokens
            self.stats.prefill_seconds += seconds * share
            self.stats.decode_seconds += seconds * (1 - share)
        self.stats.prefill_tokens += sum(c.count for c in plan.prefill)
        ready = [c.seq for c in plan.chunks if c.last]
        if not ready:
            return [], None
        began = time.perf_counter()
        logits = self.model.logits(torch.cat(hidden) if len(hidden) > 1 else hidden[0], self.packed)
        self.stats.decode_seconds += time.perf_counter() - began
        return ready, logits

    def scrub(self, blocks: list[int]) -> None:
        """Zero blocks that may hold NaN: a masked key has probability 0, but 0 times NaN is NaN."""
        if blocks:
            self.cache.keys[:, blocks] = 0
            self.cache.values[:, blocks] = 0

    def _forward(self, chunks: list[Chunk]) -> Tensor:
        """Hidden states [n, D] of the last token of every chunk that completes its sequence."""
        if self._capturable(chunks):
            tokens = [c.seq.tokens[c.start] for c in chunks]
            return self.graphs.step(tokens, [c.start for c in chunks], [c.seq.blocks for c in chunks])
        context = PagedContext(
            self.cache,
            [c.seq.blocks for c in chunks],
            [c.start for c in chunks],
            [c.count for c in chunks],
            prompts=[len(c.seq.request.prompt) for c in chunks],
            packed=self.packed,
        )
        fed = [token for c in chunks for token in c.seq.tokens[c.start : c.start + c.count]]
        kept = None if self.activations is None else self.activations.take(len(fed))
        tokens_T = torch.tensor(fed, device=self.model.device)
        own = self.prepared is None
        hidden = self.model(tokens_T, context) if own else self.prepared.forward(tokens_T, context, kept)
        offset, rows = 0, []
        for chunk in chunks:
            if self.activations is not None:
                seq = chunk.seq  # what it fed before and feeds again is void
                if kept is None or seq.rows is None or len(seq.rows) < chunk.start:
                    seq.rows = None
                else:
                    seq.rows[chunk.start :] = range(kept.first + offset, kept.first + offset + chunk.count)
            if chunk.seq.request.needs_prompt_scores:
                self._score_prompt(chunk, hidden[offset : offset + chunk.count])
            offset += chunk.count
            if chunk.last:
                rows.append(offset - 1)
        return hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)]

    def _capturable(self, chunks: list[Chunk]) -> bool:
        """Whether these are one next token each, and of a network whose steps can be captured."""
        decoding = all(c.count == 1 and c.last and not c.seq.request.needs_prompt_scores for c in chunks)
        return decoding and len(chunks) <= self.max_batch and self.activations is None and can_capture(self.model)

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended: what is kept of it can be found from now on."""
        if self.activations is not None and seq.rows and len(seq.rows) == seq.cached:
            self.activations.finished(seq.tokens[: seq.cached], seq.rows)

    def _score_prompt(self, chunk: Chunk, hidden_CD: Tensor) -> None:
        """Log-probs of the prompt tokens that the chunk's rows predict, at the policy's temperature."""
        request = chunk.seq.request
        assert request.prompt_logprobs is not None
        assert request.prompt_top_logprobs is not None
        end = min(chunk.count, len(request.prompt) - 1 - chunk.start)
        for low in range(0, end, _SCORED_ROWS):
            rows = hidden_CD[low : min(low + _SCORED_ROWS, end)]
            first = chunk.start + low + 1
            targets = request.prompt[first : first + rows.shape[0]]
            logp = log_softmax(self.model.logits(rows, self.packed), policy_temperature(request.params))
            own = logp.gather(1, torch.tensor(targets, device=logp.device)[:, None])[:, 0].tolist()
            top = top_alternatives(logp, [request.params.prompt_logprobs or 0] * len(targets), targets)
            request.prompt_logprobs[first : first + len(targets)] = own
            request.prompt_top_logprobs[first : first + len(targets)] = top
