"""Sampler and trainer agree bit for bit, whatever the batch, the sharing, the chunks and the preemptions."""

from __future__ import annotations

import pytest
import torch

from upslope.engine import Engine
from upslope.types import Completion, SamplingParams

from .tiny import SHAPES, assert_exact, prompt, tiny

LENGTHS = (1, 40, 63, 64, 65, 130)
DTYPES = [torch.float32, torch.bfloat16]


def numbers(groups: list[list[Completion]]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(c.tokens, c.policy_logprobs, c.sampling_logprobs) for group in groups for c in group]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_packed_forward(shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype)
    prompts = [prompt(n) for n in LENGTHS]
    for temperature in (1.0, 0.7):
        params = SamplingParams(max_tokens=9, n=3, temperature=temperature)
        groups = Engine(model, num_blocks=60).generate(prompts, params)
        assert_exact(model, prompts, groups, temperature)
        assert all(c.sampling_logprobs == c.policy_logprobs for group in groups for c in group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["grouped", "biased"])
def test_every_way_of_running_gives_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype)
    prompts = [prompt(n) for n in LENGTHS]
    params = SamplingParams(max_tokens=40, n=3, seed=5)
    plain = Engine(model, num_blocks=80, prefix_cache=False)
    expected = plain.generate(prompts, params)
    assert_exact(model, prompts, expected)
    assert plain.stats.preemptions == plain.stats.cached_tokens == 0
    assert plain.stats.prefill_tokens == sum(n for n in LENGTHS if n > 1), "a group's prompt is fed once"

    chunked = Engine(model, num_blocks=80, prefill_tokens=17, max_batch=5, prefix_cache=False)
    assert numbers(chunked.generate(prompts, params)) == numbers(expected)

    crowded = Engine(model, num_blocks=5, max_batch=7)
    assert numbers(crowded.generate(prompts, params)) == numbers(expected)
    assert crowded.stats.preemptions > 0
    assert crowded.pool.free == 5

    cached = Engine(model, num_blocks=80)
    cached.generate(prompts, params)
    before = cached.stats.cached_tokens
    assert numbers(cached.generate(prompts, params)) == numbers(expected)
    assert cached.stats.cached_tokens - before == 64 + 128 + 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_request_alone_and_in_a_crowd(dtype: torch.dtype) -> None:
    model = tiny("normed", dtype)
    mine = prompt(70, seed=9)
    wanted = SamplingParams(max_tokens=30, n=2, seed=11, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    alone = Engine(model, num_blocks=60).generate([mine], wanted, keys=[42])
    for before, after in ((0, 4), (3, 0), (5, 9)):
        engine = Engine(model, num_blocks=120, max_batch=12)
        others = [prompt(5 + 13 * i, seed=i) for i in range(before + after)]
        prompts = [*others[:before], mine, *others[before:]]
        params = [SamplingParams(max_tokens=4 + 5 * i, n=1 + i % 2, seed=i) for i in range(len(prompts))]
        params[before] = wanted
        groups = engine.generate(prompts, params, keys=[*range(before), 42, *range(after)])
        assert numbers([groups[before]]) == numbers(alone)


def test_samples_of_a_group_can_be_asked_for_one_by_one() -> None:
    model = tiny()
    p = SamplingParams(max_tokens=12, n=4, seed=3)
    group = Engine(model, num_blocks=30).generate([prompt(20)], p, keys=[7])[0]
    engine = Engine(model, num_blocks=30)
    one = SamplingParams(max_tokens=12, seed=3)
    ids = [engine.add(prompt(20), one, key=7, sample=i) for i in range(4)]
    done = {}
    while engine.busy:
        done.update({e.request_id: e.completion for e in engine.step() if e.completion})
    assert numbers([[done[i] for i in ids]]) == numbers([group])
    assert len({tuple(c.tokens) for c in group}) > 1


def test_prompt_log_probs_are_the_trainers_whatever_the_chunks() -> None:
    model = tiny("biased", torch.bfloat16)
    prompts = [prompt(n) for n in (1, 2, 64, 150)]
    params = SamplingParams(max_tokens=3, prompt_logprobs=2)
    for budget in (4096, 13):
        engine = Engine(model, num_blocks=40, prefill_tokens=budget)
        for _ in range(2):  # the second time the prefix cache could skip the prompt, and must not
            for p, (c,) in zip(prompts, engine.generate(prompts, params), strict=True):
                assert c.prompt_logprobs is not None
                assert c.prompt_logprobs[0] is None
                scored = Completion(p[1:], [], c.prompt_logprobs[1:], "length")  # type: ignore[arg-type]
                if len(p) > 1:
                    assert_exact(model, [p[:1]], [[scored]])
                assert c.prompt_top_logprobs is not None
                for token, value, top in zip(p[1:], c.prompt_logprobs[1:], c.prompt_top_logprobs[1:], strict=True):
                    assert top is not None
                    assert top[token] == value
                    assert value <= max(top.values())
                    assert len(top) in (2, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_swapped_in_mid_flight(dtype: torch.dtype) -> None:
    old, new = tiny("grouped", dtype), tiny("grouped", dtype)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.05)
    changed = {k: v.clone() for k, v in new.state_dict().items()}
    engine = Engine(old, num_blocks=30)
    first = engine.add(prompt(70), SamplingParams(max_tokens=20, n=2))
    for _ in range(8):
        engine.step()
    late = engine.add(prompt(70), SamplingParams(max_tokens=5))
    old.load_state_dict(changed)
    engine.set_version(3)
    done: dict[int, list[Completion]] = {first: [], late: []}
    while engine.busy:
        for event in engine.step():
            if event.completion:
                done[event.request_id].append(event.completion)
    for c in done[first]:
        assert c.mixed_versions
        assert c.version == 0
        whole = Completion(c.tokens[8:], [], c.policy_logprobs[8:], "length")
        assert_exact(old, [prompt(70) + c.tokens[:8]], [[whole]])
    (c,) = done[late]
    assert not c.mixed_versions
    assert c.version == 3
    assert_exact(old, [prompt(70)], [[c]])
