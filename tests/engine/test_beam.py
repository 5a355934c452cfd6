"""Beam search against exhaustive enumeration and against a plain reference without early stopping."""

from __future__ import annotations

import itertools
import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from upslope.engine import Engine
from upslope.engine.request import Beam, Candidate, Request, Sequence
from upslope.errors import ConfigError
from upslope.types import SamplingParams

from .tiny import prompt, tiny, trainer_logprobs

Table = dict[tuple[int, ...], list[float]]
Found = list[tuple[tuple[int, ...], float]]


def random_table(vocab: int, steps: int, seed: int) -> Table:
    """Next-token log-probs for every prefix."""
    rng, table = random.Random(seed), {}
    for length in range(steps):
        for prefix in itertools.product(range(vocab), repeat=length):
            weights = [rng.expovariate(1) ** 2 + 1e-3 for _ in range(vocab)]
            table[prefix] = [math.log(w / sum(weights)) for w in weights]
    return table


def exhaustive(table: Table, vocab: int, steps: int, eos: set[int], alpha: float) -> Found:
    """Every sequence that ends at its first end token or at the limit, best score first."""
    found = []
    for length in range(1, steps + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            ends = tokens[-1] in eos
            if not set(tokens[:-1]) & eos and (ends or length == steps):
                total = sum(table[tokens[:i]][t] for i, t in enumerate(tokens))
                found.append((tokens, total / length**alpha))
    return sorted(found, key=lambda x: -x[1])


def reference(table: Table, vocab: int, steps: int, eos: set[int], alpha: float, width: int) -> Found:
    """Beam search as one reads it: all candidates ranked, ends within the best `width` kept, no early stop."""
    live, done = [((), 0.0)], []
    for length in range(1, steps + 1):
        every = sorted((((*p, t), s + table[p][t]) for p, s in live for t in range(vocab)), key=lambda x: -x[1])
        done += [(c, s / length**alpha) for c, s in every[:width] if c[-1] in eos]
        live = [(c, s) for c, s in every if c[-1] not in eos][:width]
    done += [(c, s / steps**alpha) for c, s in live]
    return sorted(done, key=lambda x: -x[1])


def searched(table: Table, vocab: int, steps: int, eos: set[int], alpha: float, width: int, n: int) -> Found:
    """The same through `Beam`."""
    params = SamplingParams(n=n, beam_width=width, length_penalty=alpha, max_tokens=steps)
    request = Request(0, [9], params, limit=steps, stop_ids=frozenset(eos))
    beam = Beam(request, {0: (Sequence(request, 0, [9]), 0.0)})
    while beam.live:
        for seq, _ in list(beam.live.values()):
            ranked = sorted(enumerate(table[tuple(seq.generated)]), key=lambda x: -x[1])[: beam.candidates_wanted]
            complete = beam.report(seq, [Candidate(t, s, s) for t, s in ranked])
        assert complete
        beam.advance(0)
        assert len(beam.live) <= width
    result = []
    for seq, reason in beam.best():
        tokens = tuple(seq.generated)
        assert reason == ("stop" if tokens[-1] in eos else "length")
        result.append((tokens, math.fsum(seq.policy_logprobs) / len(tokens) ** alpha))
    return result


cases = {
    "vocab": st.integers(2, 4),
    "steps": st.integers(1, 4),
    "alpha": st.sampled_from([-0.7, 0.0, 0.6, 1.0, 2.0]),
    "ends": st.integers(0, 2),
    "n": st.integers(1, 3),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=80)
@given(**cases)
def test_wide_beam_is_exhaustive(vocab: int, steps: int, alpha: float, ends: int, n: int, seed: int) -> None:
    table, eos = random_table(vocab, steps, seed), set(range(ends))
    got = searched(table, vocab, steps, eos, alpha, vocab**steps + n, n)
    wanted = exhaustive(table, vocab, steps, eos, alpha)[:n]
    assert [t for t, _ in got] == [t for t, _ in wanted]
    assert [s for _, s in got] == pytest.approx([s for _, s in wanted])


@settings(max_examples=200)
@given(width=st.integers(1, 6), **{**cases, "n": st.integers(1, 6)})
def test_narrow_beam_is_the_reference(
    width: int, vocab: int, steps: int, alpha: float, ends: int, n: int, seed: int
) -> None:
    table, eos, n = random_table(vocab, steps, seed), set(range(ends)), min(n, width)
    got = searched(table, vocab, steps, eos, alpha, width, n)
    wanted = reference(table, vocab, steps, eos, alpha, width)[:n]
    assert [t for t, _ in got] == [t for t, _ in wanted]


def model_table(model: torch.nn.Module, start: list[int], vocab: int, steps: int) -> Table:
    prefixes = [p for n in range(steps) for p in itertools.product(range(vocab), repeat=n)]
    pairs = [(start + list(p), [t]) for p in prefixes for t in range(vocab)]
    logp = iter(trainer_logprobs(model, pairs))  # type: ignore[arg-type]
    return {p: [next(logp)[0] for _ in range(vocab)] for p in prefixes}


@pytest.mark.parametrize("blocks", [60, 8])
@pytest.mark.parametrize("length", [62, 64])
def test_engine_finds_the_optimum_of_a_real_network(length: int, blocks: int) -> None:
    vocab, steps, eos = 3, 4, {0}
    model = tiny(vocab=vocab)
    start = prompt(length, vocab=vocab)
    table = model_table(model, start, vocab, steps)
    engine = Engine(model, eos_token_ids=eos, num_blocks=blocks, max_batch=6)
    params = [SamplingParams(max_tokens=steps, beam_width=w, n=2, length_penalty=0.8) for w in (81, 3, 2)]
    groups = engine.generate([start] * 3, params)
    assert (engine.stats.preemptions > 0) == (blocks == 8)
    assert engine.pool.free == blocks
    ranked = [exhaustive(table, vocab, steps, eos, 0.8)] + [reference(table, vocab, steps, eos, 0.8, w) for w in (3, 2)]
    for group, wanted in zip(groups, ranked, strict=True):
        assert [tuple(c.tokens) for c in group] == [t for t, _ in wanted[:2]]
        for c in group:
            assert c.policy_logprobs == c.sampling_logprobs
            assert c.policy_logprobs == [table[tuple(c.tokens[:i])][t] for i, t in enumerate(c.tokens)]
            assert c.finish_reason == ("stop" if c.tokens[-1] == 0 else "length")


def test_beams_obey_the_token_mask_and_live_beside_samples() -> None:
    model = tiny(vocab=5)
    engine = Engine(model, eos_token_ids=[0], num_blocks=40)
    params = SamplingParams(max_tokens=5, beam_width=4, n=3)
    beam = engine.add(prompt(9, vocab=5), params, token_mask=lambda _, generated: [1, 2] if generated else [3])
    other = engine.add(prompt(9, vocab=5), SamplingParams(max_tokens=20, ignore_eos=True))
    done: dict[int, list[list[int]]] = {beam: [], other: []}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                done[event.request_id].append(event.completion.tokens)
    assert len(done[beam]) == 3
    assert all(tokens[0] == 3 and set(tokens[1:]) <= {1, 2} and len(tokens) == 5 for tokens in done[beam])
    assert len(done[other][0]) == 20
    assert engine.pool.free == 40


@pytest.mark.parametrize("wrong", [{"n": 3}, {"top_k": 4}, {"top_p": 0.5}, {"stop": ("a",)}, {"logprobs": 1}])
def test_beam_search_refuses_what_it_cannot_honour(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="beam_width = 2"):
        Engine(tiny(), num_blocks=4).add([1], SamplingParams(beam_width=2, **wrong))  # type: ignore[arg-type]
