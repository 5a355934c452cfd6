"""Decoding steps as CUDA graphs: a step of some rows is captured once and replayed, so that no kernel waits for Python.

A graph reads tokens, positions and block tables from memory that stays where it is; only what changed is sent. Counts
of rows are rounded up, and the rows that fill up write to a block of the cache that nobody owns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from upslope.models.attention.context import BLOCK, KVCache, StepContext
from upslope.models.attention.gpu import fused_on
from upslope.models.protocol import CausalModel

_STEP = 16


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

    def step(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [n, D] of one token of each of n sequences; overwritten by the next step."""
        count = len(tokens)
        rows = rounded_rows(count)
        fill = rows - count
        numbers = torch.tensor([[*tokens, *[0] * fill], [*positions, *[0] * fill]])
        self._tokens[:rows].copy_(numbers[0])
        self._positions[:rows].copy_(numbers[1])
        self._send([*map(list, tables), *[[self._spare]] * fill])
        if rows not in self._graphs:
            self._graphs[rows] = self.record(lambda: self._forward(rows), self._pool)
        replay, hidden = self._graphs[rows]
        replay()
        return hidden[:count]

    def _forward(self, rows: int) -> Tensor:
        context = StepContext(self.cache, self._positions[:rows], self._tables[:rows])
        return self.model(self._tokens[:rows], context)

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
