"""The block pool: counts, copy-on-write, prefix cache, eviction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from upslope.engine import request, scheduler
from upslope.engine import scheduler as blocks
from upslope.engine.request import Request, Sequence
from upslope.engine.scheduler import BlockPool, OutOfBlocks
from upslope.types import SamplingParams

SIZE = 4


def sequence(tokens: list[int], id: int = 0) -> Sequence:
    return Sequence(Request(id, tokens, SamplingParams(), limit=8), 0, list(tokens))


def feed(pool: BlockPool, seq: Sequence, count: int | None = None) -> list[tuple[int, int]]:
    count = seq.pending if count is None else count
    copies = pool.cover(seq, count)
    seq.cached += count
    pool.commit(seq)
    return copies


@pytest.mark.parametrize("module", [blocks, request, scheduler])
def test_bookkeeping_imports_no_torch(module: object) -> None:
    tree = ast.parse(Path(module.__file__).read_text())  # type: ignore[attr-defined]
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [n for n in names if n.split(".")[0] in ("torch", "numpy", "transformers")]


@pytest.mark.parametrize(("tokens", "blocks_needed"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_at_the_borders(tokens: int, blocks_needed: int) -> None:
    pool = BlockPool(4, SIZE)
    seq = sequence(list(range(tokens)))
    assert pool.needed(seq, tokens) == blocks_needed
    feed(pool, seq)
    assert len(seq.blocks) == blocks_needed
    assert pool.free == 4 - blocks_needed
    pool.release(seq)
    assert pool.free == 4


def test_partly_filled_shared_block_is_copied_by_all_but_the_last_writer() -> None:
    pool = BlockPool(8, SIZE)
    parent = sequence([1, 2, 3, 4, 5, 6])
    feed(pool, parent)
    first, tail = parent.blocks
    children = [parent.child(i) for i in (1, 2)]
    for child in children:
        pool.fork(parent, child)
    assert pool.owners[tail] == 3
    copies = []
    for seq in (parent, *children):
        seq.tokens.append(9)
        copies.append(feed(pool, seq))
    assert [len(c) for c in copies] == [1, 1, 0]
    assert all(source == tail for c in copies for source, _ in c)
    assert {s.blocks[0] for s in (parent, *children)} == {first}
    assert len({s.blocks[1] for s in (parent, *children)}) == 3
    assert pool.owners[first] == 3


def test_full_shared_block_needs_no_copy() -> None:
    pool = BlockPool(8, SIZE)
    parent = sequence([1, 2, 3, 4])
    feed(pool, parent)
    child = parent.child(1)
    pool.fork(parent, child)
    child.tokens.append(5)
    assert feed(pool, child) == []
    assert child.blocks[0] == parent.blocks[0]


def test_prefix_is_found_again_but_one_token_is_left_to_feed() -> None:
    pool = BlockPool(8, SIZE)
    old = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    feed(pool, old)
    kept = list(old.blocks)
    pool.release(old)
    same, longer, other = sequence([1, 2, 3, 4, 5, 6, 7, 8]), sequence([*range(1, 9), 9]), sequence([2, *range(2, 9)])
    assert pool.match(same) == 4
    assert pool.match(longer) == 8
    assert longer.blocks == kept
    assert pool.match(other) == 0
    assert pool.owners[kept[0]] == 2


def test_same_block_after_another_beginning_is_another_block() -> None:
    pool = BlockPool(8, SIZE)
    feed(pool, sequence([1, 1, 1, 1, 5, 6, 7, 8]))
    assert pool.match(sequence([2, 2, 2, 2, 5, 6, 7, 8, 9])) == 0
    feed(pool, sequence([2, 2, 2, 2]))
    assert pool.match(sequence([2, 2, 2, 2, 5, 6, 7, 8, 9])) == 4


def test_least_recently_used_prefix_is_given_away_first() -> None:
    pool = BlockPool(3, SIZE)
    for token in (1, 2, 3):
        seq = sequence([token] * 4)
        feed(pool, seq)
        pool.release(seq)
    again = sequence([1] * 5)
    assert pool.match(again) == 4
    pool.release(again)
    new = sequence([9] * 4)
    feed(pool, new)
    assert pool.match(sequence([2] * 5)) == 0
    assert pool.match(sequence([1] * 5)) == 4
    assert pool.match(sequence([3] * 5)) == 4


def test_flush_forgets_and_discard_forgets_one() -> None:
    pool = BlockPool(4, SIZE)
    seq = sequence([1] * 4)
    feed(pool, seq)
    assert pool.discard(seq) == [0]
    assert pool.match(sequence([1] * 5)) == 0
    seq = sequence([2] * 4)
    feed(pool, seq)
    pool.release(seq)
    pool.flush()
    assert pool.match(sequence([2] * 5)) == 0
    assert pool.free == 4


def test_switched_off_prefix_cache_remembers_nothing() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=False)
    seq = sequence([1] * 8)
    feed(pool, seq)
    pool.release(seq)
    assert pool.match(sequence([1] * 9)) == 0


def test_more_than_there_is() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(OutOfBlocks, match="3 blocks needed, 2 free"):
        pool.cover(sequence([1] * 9), 9)
