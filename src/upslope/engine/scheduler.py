"""Which sequences run in the next step: continuous batching, chunked prefill, preemption by recompute. No torch.

Everything goes by age. Running sequences come first, oldest first; then waiting ones are admitted, oldest first and
none out of turn, while rows, blocks and prefill budget last. When blocks run out, idle holders give theirs back, then
the newest running sequence is sent back to wait and will be recomputed. The oldest sequence therefore always
advances, and the pool is large enough for any one of them (the engine checks), so nobody starves.
"""

import bisect
from dataclasses import dataclass, field

from upslope.engine.blocks import BlockPool
from upslope.engine.request import Request, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Feed `count` tokens of `seq` from position `start`; `last` says that the next token can then be drawn."""

    seq: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """True when nothing of the sequence stays unfed."""
        return self.start + self.count == len(self.seq.tokens)


@dataclass(slots=True)
class Plan:
    """One step: block copies to make first; then single-token rows and longer chunks."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    decode: list[Chunk] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        """Prefill and decode, in the order their rows are drawn from."""
        return self.prefill + self.decode


def _newest_first(seq: Sequence) -> tuple[int, int]:
    request, sample = seq.order
    return -request, -sample


class Scheduler:
    """`max_batch` running sequences, at most `prefill_tokens` prompt tokens a step.

    With `whole_prompts` nothing is cut into chunks: what does not fit the rest of the budget waits for the next step,
    and what does not fit the whole budget is fed as the only prompt of a step.
    `waiting` is sorted newest first (the next to be admitted is last); `parked` sequences have nothing to feed: beams
    that wait for their siblings. Waiting and parked ones may hold blocks that they can be asked to give back.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, prefill_tokens: int, whole_prompts: bool = False) -> None:
        self.pool = pool
        self.whole_prompts = whole_prompts
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.preemptions = 0
        self.reused_tokens = 0

    @property
    def everyone(self) -> list[Sequence]:
        """Every sequence that has not finished."""
        return [*self.running, *self.parked, *self.waiting]

    def add(self, seq: Sequence) -> None:
        """Queue a sequence by its age."""
        bisect.insort(self.waiting, seq, key=_newest_first)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Queue `child`, which shares what `parent` has in the cache."""
        self.pool.fork(parent, child)
        self.add(child)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that has finished and release its blocks."""
        self._take_out(seq)
        self.pool.release(seq)

    def discard(self, seq: Sequence) -> list[int]:
        """Forget a sequence whose cached values are spoilt; returns the blocks to be cleaned."""
        self._take_out(seq)
        return self.pool.discard(seq)

    def sequences(self, request: Request) -> list[Sequence]:
        """The unfinished sequences of a request."""
        return [s for s in self.everyone if s.request is request]

    def restart(self) -> None:
        """Send everything back to be recomputed and forget every prefix: the weights changed."""
        for seq in self.everyone:
            self.pool.release(seq)
        for seq in self.running:
            self.add(seq)
        self.running = []
        self.pool.flush()

    def schedule(self) -> Plan:
        """Decide the next step; blocks are assigned, nothing else is changed until `settle`."""
        plan = Plan()
        self._park()
        before = self.preemptions
        for seq in sorted(self.running, key=lambda s: s.order):
            if seq in self.running:
                self._continue(seq, plan)
        if self.preemptions == before:
            while self.waiting and self._admit(self.waiting[-1], plan):
                pass
        return plan

    def settle(self, plan: Plan) -> None:
        """The plan was run: its tokens are in the cache."""
        for chunk in plan.chunks:
            chunk.seq.cached += chunk.count
            self.pool.commit(chunk.seq)

    def _park(self) -> None:
        """Beams that have reported leave the batch until their siblings have."""
        self.parked.extend(s for s in self.running if not s.pending)
        self.running = [s for s in self.running if s.pending]

    def _continue(self, seq: Sequence, plan: Plan) -> None:
        count = self._share(seq, plan)
        while count and self.pool.needed(seq, count) > self.pool.free:
            victim = self._idle_holder(seq) or max(self.running, key=lambda s: s.order)
            self._preempt(victim)
            if victim is seq:
                return
        if count:
            self._feed(seq, count, plan)

    def _admit(self, seq: Sequence, plan: Plan) -> bool:
        occupied = sum(1 + s.forks for s in self.running)
        if occupied >= self.max_batch or not self._share(seq, plan):
            return False
        matched = 0 if seq.request.needs_prompt_scores else self.pool.match(seq)
        reserve = -(-len(self.running) // 4)  # a running row needs a block every 64 steps: about 16 steps' worth
        while self.pool.needed(seq, seq.pending) + reserve > self.pool.free:
            idle = None if self.running else self._idle_holder(seq)
            if idle is None:
                if matched:
                    self.pool.release(seq)
                return False
            self._preempt(idle)
        self.reused_tokens += matched
        self.waiting.pop()
        self.running.append(seq)
        self._feed(seq, self._share(seq, plan), plan)
        return True

    def _share(self, seq: Sequence, plan: Plan) -> int:
        """Tokens of the sequence this step may feed: a single one always, more within the prefill budget."""
        if seq.pending == 1:
            return 1
        left = self.prefill_tokens - sum(c.count for c in plan.prefill)
        if self.whole_prompts and plan.prefill and left < seq.pending:
            return 0
        return seq.pending if self.whole_prompts else min(seq.pending, left)

    def _feed(self, seq: Sequence, count: int, plan: Plan) -> None:
        plan.copies += self.pool.cover(seq, count)
        chunk = Chunk(seq, seq.cached, count)
        (plan.decode if count == 1 else plan.prefill).append(chunk)

    def _idle_holder(self, but: Sequence) -> Sequence | None:
        """The newest sequence that holds blocks without running."""
        holders = [s for s in (*self.parked, *self.waiting) if s.blocks and s is not but]
        return max(holders, key=lambda s: s.order, default=None)

    def _preempt(self, seq: Sequence) -> None:
        self.preemptions += 1
        self.pool.release(seq)
        if seq in self.running:
            self.running.remove(seq)
            self.add(seq)

    def _take_out(self, seq: Sequence) -> None:
        for queue in (self.running, self.parked, self.waiting):
            if seq in queue:
                queue.remove(seq)
                return
