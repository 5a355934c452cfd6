"""Random walks: the graph, what a walk is worth by definition, and that the optimum is 1."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError, DataError
from upslope.tasks.base import load_task
from upslope.tasks.toys import GOAL, LETTERS, RandomWalks


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    loaded = load_task("random_walks")
    assert isinstance(loaded, RandomWalks)
    return loaded


def test_the_graph_is_always_the_same_and_has_no_dead_end(task: RandomWalks) -> None:
    assert task.edges == RandomWalks().edges
    assert task.edges != RandomWalks(seed=1).edges
    assert len(task.edges) == 21
    assert all(task.edges)
    assert all(node not in successors for node, successors in enumerate(task.edges) if node != GOAL)


def test_a_shortest_walk_is_worth_exactly_one(task: RandomWalks) -> None:
    prompts = task.prompts("eval", len(task.starts), seed=0)
    for prompt, reward in zip(prompts, task.rewards(prompts, [str(p.answer) for p in prompts]), strict=True):
        assert reward.value == 1.0, prompt
        assert reward.correct


def test_shortest_lengths_by_exhaustion() -> None:
    """Every walk of a small graph, tried one by one."""
    small = RandomWalks(nodes=6, edge_probability=0.3, max_length=6, seed=5)
    for start in small.starts:
        lengths = [
            small.length_of(LETTERS[start] + "".join(rest))
            for n in range(1, 6)
            for rest in itertools.product(LETTERS[:6], repeat=n)
        ]
        assert min(x for x in lengths if x is not None) == small.shortest[start]


def test_worth_by_hand(task: RandomWalks) -> None:
    prompt = next(p for p in task.prompts("train", len(task.starts), seed=0) if 3 <= len(str(p.answer)) <= 5)
    start, best = str(prompt.text), str(prompt.answer)
    shortest = 1 + len(best)
    wrong = next(x for x in LETTERS[1:21] if LETTERS.index(x) not in task.edges[LETTERS.index(start)])
    told = {best: 1.0, best + "kkk": 1.0, " ".join(best): 1.0, best[:-1]: 0.0, wrong + "a": 0.0, "": 0.0, "?": 0.0}
    found = [r.value for r in task.rewards([prompt] * len(told), list(told))]
    assert found == list(told.values())
    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        walk = task.walk(LETTERS.index(start), draw)
        (reward,) = task.rewards([prompt], [walk[1:]])
        if walk.endswith("a"):
            assert reward.value == pytest.approx((10 - len(walk)) / (10 - shortest))
        else:
            assert len(walk) == 10
            assert reward.value == 0.0
        seen.add(reward.value)
    assert len(seen) > 2


@given(st.text(max_size=20))
def test_any_text_is_worth_something_between_zero_and_one(text: str) -> None:
    task = RandomWalks()
    prompts = task.prompts("train", 3, seed=1)
    assert all(0.0 <= float(r.value or 0.0) <= 1.0 for r in task.rewards(prompts, [text] * 3))


def test_walks_to_imitate_are_legal_and_rarely_best(task: RandomWalks) -> None:
    walks = task.walks(200, seed=3)
    assert walks == task.walks(200, seed=3)
    for walk in walks:
        nodes = [LETTERS.index(x) for x in walk]
        assert all(b in task.edges[a] for a, b in itertools.pairwise(nodes))
    best = sum(len(w) == task.shortest[LETTERS.index(w[0])] and w.endswith("a") for w in walks)
    assert best < 100
    (turn, reply) = task.demonstration(task.prompts("train", 1, seed=0)[0])
    assert turn.content + reply.content == task.walk(LETTERS.index(turn.content), _same(turn.content))


def _same(text: str) -> random.Random:
    from upslope.tasks.base import derive_seed

    return random.Random(derive_seed("walk", text))


def test_prompts_are_distinct_and_limited(task: RandomWalks) -> None:
    prompts = task.prompts("train", len(task.starts), seed=0)
    assert len({p.key for p in prompts}) == len(prompts) == len(task.starts)
    with pytest.raises(DataError, match="start nodes"):
        task.prompts("train", 26, seed=0)


@pytest.mark.parametrize(
    "spec",
    ["random_walks:nodes=1", "random_walks:nodes=40", "random_walks:edge_probability=0.0", "random_walks:max_length=2"],
)
def test_bad_parameters_are_one_clear_line(spec: str) -> None:
    with pytest.raises(ConfigError, match="random_walks") as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)
