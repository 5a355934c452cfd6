"""Who owns which block of the key/value cache: counts, sharing, copy-on-write, prefix cache. Free of torch.

A block holds the keys and values of `block_size` consecutive tokens of a sequence. Blocks are counted: the samples of
a group share their prompt's blocks, and a sequence that is about to write into a block somebody else also holds gets
a copy first. A full block stays findable under a digest of all tokens up to its end; when its last owner
leaves it is kept, and the least recently used of these is given away only when no empty block is left.
(PagedAttention: Kwon et al. 2023, arXiv 2309.06180.)
"""

import hashlib
from array import array
from collections import OrderedDict

from upslope.engine.request import Sequence


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free; callers ask `needed` first."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

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
