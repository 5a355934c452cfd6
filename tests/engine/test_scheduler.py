"""The scheduler and the block pool under random workloads, with a memory that knows what it should hold."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from upslope.engine.request import Request, Sequence
from upslope.engine.scheduler import BlockPool, Plan, Scheduler
from upslope.types import SamplingParams

SIZE = 4


class Memory:
    """Block contents: the value of a slot is the whole prefix it stands for, as keys and values of a network are."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, plan: Plan, weights: int) -> None:
        for source, target in plan.copies:
            for offset in range(SIZE):
                self.slots[target, offset] = self.slots.get((source, offset), ())
        for chunk in plan.chunks:
            seq = chunk.seq
            for position in range(chunk.start, chunk.start + chunk.count):
                block = seq.blocks[position // SIZE]
                assert self.pool.owners[block] == 1, "written to while shared"
                self.slots[block, position % SIZE] = (weights, *seq.tokens[: position + 1])
        for chunk in plan.chunks:
            seq = chunk.seq
            for position in range(chunk.start + chunk.count):
                found = self.slots[seq.blocks[position // SIZE], position % SIZE]
                assert found == (weights, *seq.tokens[: position + 1]), "another sequence's keys"


class Workload:
    """Drives the scheduler as the engine does, with tokens that depend on sample and position."""

    def __init__(self, num_blocks: int, max_batch: int, prefill_tokens: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, SIZE, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, prefill_tokens=prefill_tokens)
        self.memory = Memory(self.pool)
        self.weights = 0
        self.next_id = 0
        self.open: Counter[int] = Counter()

    def add(self, prompt: list[int], n: int, limit: int) -> None:
        request = Request(self.next_id, prompt, SamplingParams(n=n, max_tokens=limit), limit)
        self.next_id += 1
        self.open[request.id] = n
        self.scheduler.add(Sequence(request, 0, list(prompt), forks=n - 1))

    def step(self) -> Plan:
        running = sorted(self.scheduler.running, key=lambda s: s.order)
        plan = self.scheduler.schedule()
        assert plan.chunks, "work but no progress"
        if running:
            assert running[0] in [c.seq for c in plan.chunks], "the oldest running sequence did not advance"
        assert sum(c.count for c in plan.prefill) <= self.scheduler.prefill_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_batch
        assert len({id(c.seq) for c in plan.chunks}) == len(plan.chunks)
        self.memory.run(plan, self.weights)
        self.scheduler.settle(plan)
        for chunk in plan.chunks:
            if not chunk.seq.pending:
                self.drawn(chunk.seq)
        return plan

    def drawn(self, seq: Sequence) -> None:
        children = [seq.child(i) for i in range(1, seq.forks + 1)]
        seq.forks = 0
        for child in children:
            self.scheduler.fork(seq, child)
        for member in (seq, *children):
            member.tokens.append((member.sample * 7 + member.num_generated) % 3)
            if member.num_generated >= seq.request.limit - member.sample % 2:
                self.scheduler.remove(member)
                self.open[seq.request.id] -= 1

    def finish(self) -> None:
        steps = 0
        while self.scheduler.everyone:
            self.step()
            steps += 1
            assert steps < 3000, "starvation"
        assert not +self.open
        assert self.pool.free == self.pool.num_blocks
        assert not any(self.pool.owners)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.load = Workload(num_blocks=9, max_batch=3, prefill_tokens=6, prefix_cache=True)

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 17),
        tail=st.integers(0, 3),
        n=st.integers(1, 5),
        limit=st.integers(2, 12),
    )
    def add(self, family: int, length: int, tail: int, n: int, limit: int) -> None:
        self.load.add([family] * length + [9] * tail, n, limit)

    @precondition(lambda self: self.load.scheduler.everyone)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.load.scheduler.everyone:
                self.load.step()

    @precondition(lambda self: self.load.scheduler.everyone)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        everyone = self.load.scheduler.everyone
        victim = everyone[which % len(everyone)].request
        for seq in self.load.scheduler.sequences(victim):
            self.load.scheduler.remove(seq)
        self.load.open[victim.id] = 0

    @rule()
    def new_weights(self) -> None:
        self.load.weights += 1
        self.load.scheduler.restart()

    @invariant()
    def every_block_is_counted_once_per_owner(self) -> None:
        pool = self.load.pool
        held = Counter(b for s in self.load.scheduler.everyone for b in s.blocks)
        assert [held[b] for b in range(pool.num_blocks)] == pool.owners
        assert pool.free == sum(not owners for owners in pool.owners)
        assert len(set(pool._empty) | set(pool._idle)) == pool.free
        assert sorted(pool._block_of.values()) == sorted(pool._key_of)

    def teardown(self) -> None:
        self.load.finish()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_pool_for_one_serves_many_one_after_the_other() -> None:
    load = Workload(num_blocks=4, max_batch=8, prefill_tokens=5, prefix_cache=False)
    for family in range(4):
        load.add([family] * 5, n=3, limit=12)
    load.finish()
    assert load.scheduler.preemptions > 0


def test_older_requests_are_admitted_first() -> None:
    load = Workload(num_blocks=40, max_batch=2, prefill_tokens=100, prefix_cache=False)
    for family in range(5):
        load.add([family] * 3, n=1, limit=4)
    order: list[int] = []
    while load.scheduler.everyone:
        order += [c.seq.request.id for c in load.step().prefill]
    assert order == [0, 1, 2, 3, 4]


def test_the_newest_goes_back_when_blocks_run_out() -> None:
    """Three full blocks, one more is free, and each of the three needs one: the oldest get what there is."""
    load = Workload(num_blocks=4, max_batch=3, prefill_tokens=100, prefix_cache=False)
    for family in range(3):
        load.add([family] * SIZE, n=1, limit=4)
    load.step()
    assert [s.request.id for s in load.scheduler.running] == [0, 1, 2]
    load.step()
    assert [s.request.id for s in load.scheduler.running] == [0, 1]
    assert [s.request.id for s in load.scheduler.waiting] == [2]
    finished = []
    while load.scheduler.everyone:
        before = {s.request.id for s in load.scheduler.everyone}
        load.step()
        finished += sorted(before - {s.request.id for s in load.scheduler.everyone})
    assert finished == [0, 1, 2]


def test_prompt_of_a_group_is_fed_once() -> None:
    load = Workload(num_blocks=40, max_batch=8, prefill_tokens=100, prefix_cache=False)
    load.add([1] * 10, n=6, limit=4)
    fed = 0
    while load.scheduler.everyone:
        fed += sum(c.count for c in load.step().prefill)
    assert fed == 10


def test_long_prompt_is_cut_to_the_budget_while_others_decode() -> None:
    load = Workload(num_blocks=40, max_batch=8, prefill_tokens=5, prefix_cache=False)
    load.add([1] * 3, n=1, limit=9)
    load.step()
    load.add([2] * 12, n=1, limit=2)
    chunks = []
    while load.scheduler.everyone:
        plan = load.step()
        chunks += [c.count for c in plan.prefill]
        assert len(chunks) > 3 or any(c.seq.request.id == 0 for c in plan.decode)
    assert chunks == [5, 5, 2]


def test_preempted_prompt_comes_back_through_the_prefix_cache() -> None:
    load = Workload(num_blocks=40, max_batch=8, prefill_tokens=100, prefix_cache=True)
    load.add([1] * 17, n=1, limit=5)
    load.step()
    seq = load.scheduler.running[0]
    load.scheduler._preempt(seq)
    plan = load.step()
    assert [(c.start, c.count) for c in plan.chunks] == [(16, 2)]
    assert load.scheduler.reused_tokens == 16
