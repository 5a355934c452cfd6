"""Which sequences run in the next step, and who owns which block of the key/value cache. No torch.

Continuous batching, chunked prefill, preemption by recompute; blocks that are shared, copied on writing, remembered.

Everything goes by age. Running sequences come first, oldest first; then waiting ones are admitted, oldest first and
none out of turn, while rows, blocks and prefill budget last. When blocks run out, idle holders give theirs back, then
the newest running sequence is sent back to wait and will be recomputed. The oldest sequence therefore always
advances, and the pool is large enough for any one of them (the engine checks), so nobody starves.
"""

import bisect
import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from upslope.engine.request import Request, Sequence


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free; callers ask `needed` first."""


class BlockPool:
    """`num_blocks` blocks, each of the keys and values of `block_size` consecutive tokens of a sequence.

    Blocks are counted: the samples of a group share their prompt's blocks, and a sequence that is about to write into
    a block somebody else also holds gets a copy first. A full block stays findable under a digest of all tokens up to
    its end; when its last owner leaves it is kept, and the least recently used of these is given away only when no
    empty block is left. (PagedAttention: Kwon et al. 2023, arXiv 2309.06180.)
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.owners = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks nobody owns, remembered prefixes included."""
        return len(self._empty) + len(self._idle)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-tokens // self.block_size)

    def match(self, seq: Sequence) -> int:
        """Give a sequence without blocks every remembered block its tokens begin with; returns tokens found.

        At least one token is left to feed, because its hidden state is what the next token is drawn from.
        """
        if not self.prefix_cache or seq.blocks:
            return 0
        for key in self._keys(seq, (len(seq.tokens) - 1) // self.block_size):
            block = self._block_of.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self.owners[block] += 1
            seq.blocks.append(block)
        seq.committed = len(seq.blocks)
        seq.cached = seq.committed * self.block_size
        return seq.cached

    def needed(self, seq: Sequence, count: int) -> int:
        """Blocks that must be free before `count` tokens can be written after the cached ones."""
        new = self.blocks_for(seq.cached + count) - len(seq.blocks)
        return max(0, new) + (1 if self._shared_tail(seq) else 0)

    def cover(self, seq: Sequence, count: int) -> list[tuple[int, int]]:
        """Make the next `count` tokens writable by this sequence alone; returns (from, to) block copies to make."""
        if self.needed(seq, count) > self.free:
            raise OutOfBlocks(f"{self.needed(seq, count)} blocks needed, {self.free} free")
        copies = []
        if self._shared_tail(seq):
            position = seq.cached // self.block_size
            source, target = seq.blocks[position], self._allocate()
            seq.blocks[position] = target
            self._drop(source)
            copies.append((source, target))
        while len(seq.blocks) * self.block_size < seq.cached + count:
            seq.blocks.append(self._allocate())
        return copies

    def commit(self, seq: Sequence) -> None:
        """Remember the sequence's newly full blocks (their keys and values must have been computed)."""
        full = seq.cached // self.block_size
        if not self.prefix_cache or seq.committed >= full:
            return
        keys = self._keys(seq, full)
        for position in range(seq.committed, full):
            block = seq.blocks[position]
            if keys[position] not in self._block_of and block not in self._key_of:
                self._block_of[keys[position]] = block
                self._key_of[block] = keys[position]
        seq.committed = full

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share everything the parent has in the cache."""
        child.blocks = list(parent.blocks)
        child.cached, child.committed = parent.cached, parent.committed
        for block in child.blocks:
            self.owners[block] += 1

    def release(self, seq: Sequence) -> None:
        """Give up the sequence's blocks; the ends of prefixes become the first to be forgotten."""
        for block in reversed(seq.blocks):
            self._drop(block)
        seq.blocks = []
        seq.cached = seq.committed = 0

    def discard(self, seq: Sequence) -> list[int]:
        """Release blocks whose content is spoilt: forget them as prefixes; returns those that nobody owns now."""
        blocks = list(seq.blocks)
        for block in blocks:
            self._forget(block)
        self.release(seq)
        return [block for block in blocks if not self.owners[block]]

    def flush(self) -> None:
        """Forget every prefix (the weights changed)."""
        self._empty.extend(self._idle)
        self._idle.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _shared_tail(self, seq: Sequence) -> bool:
        position, filled = divmod(seq.cached, self.block_size)
        return filled > 0 and self.owners[seq.blocks[position]] > 1

    def _keys(self, seq: Sequence, count: int) -> list[bytes]:
        """Digests of the first `count` full blocks; each covers every token up to the block's end."""
        while len(seq.keys) < count:
            start = len(seq.keys) * self.block_size
            digest = hashlib.blake2b(seq.keys[-1] if seq.keys else b"", digest_size=16)
            digest.update(array("q", seq.tokens[start : start + self.block_size]).tobytes())
            seq.keys.append(digest.digest())
        return seq.keys[:count]

    def _allocate(self) -> int:
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self.owners[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self.owners[block] -= 1
        if not self.owners[block]:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


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
        bisect.insort(self.waiting, seq, key=lambda s: (-s.request.id, -s.sample))

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
        # beams that have reported leave the batch until their siblings have
        self.parked += (s for s in self.running if not s.pending)
        self.running = [s for s in self.running if s.pending]
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
        holders = (s for s in (*self.parked, *self.waiting) if s.blocks and s is not but)
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
