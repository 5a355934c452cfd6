"""Encoder-decoders through the engine: the trainer's bits in every way of running, whole prompts, beams, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from tiny_seq2seq import EOS, PAD, SHAPES, assert_exact, prompt, tiny, trainer_logprobs

from upslope.engine import Engine
from upslope.errors import ConfigError, DataError
from upslope.types import Completion, SamplingParams

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (1, 7, 63, 64, 65, 140)


def numbers(groups: Sequence[Sequence[Completion]]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(c.tokens, c.policy_logprobs, c.sampling_logprobs) for group in groups for c in group]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_packed_forward(shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype)
    prompts = [prompt(model, n) for n in LENGTHS]
    for temperature in (1.0, 0.7):
        params = SamplingParams(max_tokens=9, n=4, temperature=temperature)
        groups = Engine(model, num_blocks=60).generate(prompts, params)
        assert len({tuple(c.tokens) for c in groups[0]}) > 1
        assert_exact(model, prompts, groups, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 20), (3, 36), (2, 64), (2, 128)])
def test_head_widths_keep_the_bits(heads: int, width: int, dtype: torch.dtype) -> None:
    model = tiny("post", dtype, hidden_size=width, num_attention_heads=heads, activation="gelu")
    prompts = [prompt(model, n) for n in (2, 70)]
    groups = Engine(model, num_blocks=40).generate(prompts, SamplingParams(max_tokens=20, n=3))
    assert_exact(model, prompts, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_longer_than_two_blocks(dtype: torch.dtype) -> None:
    model = tiny("pre", dtype)
    prompts = [prompt(model, n) for n in (3, 130)]
    groups = Engine(model, num_blocks=40).generate(prompts, SamplingParams(max_tokens=150, n=2))
    assert [len(c.tokens) for group in groups for c in group] == [150] * 4
    assert_exact(model, prompts, groups)


@pytest.mark.parametrize(("shape", "dtype"), [("post", torch.bfloat16), ("separate", torch.float32)], ids=str)
def test_every_way_of_running_gives_the_same_bits(shape: str, dtype: torch.dtype) -> None:
    model = tiny(shape, dtype)
    lengths = (1, 63, 140)
    prompts = [prompt(model, n) for n in lengths]
    params = SamplingParams(max_tokens=70, n=4, seed=5)
    plain = Engine(model, num_blocks=120)
    expected = plain.generate(prompts, params)
    assert_exact(model, prompts, expected)
    assert plain.stats.preemptions == 0
    assert plain.stats.prefill_tokens == sum(n + 1 for n in lengths), "a group's prompt is fed once"

    narrow = Engine(model, num_blocks=120, prefill_tokens=17, max_batch=6)
    assert numbers(narrow.generate(prompts, params)) == numbers(expected)

    crowded = Engine(model, num_blocks=5, max_batch=9)
    assert numbers(crowded.generate(prompts, params)) == numbers(expected)
    assert crowded.stats.preemptions > 0
    assert crowded.pool.free == 5

    again = plain.generate(prompts, params)
    assert numbers(again) == numbers(expected)
    assert plain.stats.cached_tokens == 0, "no prefix of a source means anything"


def test_prompts_are_never_cut_and_share_the_budget() -> None:
    model = tiny()
    engine = Engine(model, num_blocks=40, prefill_tokens=50)
    for n in (30, 10, 30, 80, 5):
        engine.add(prompt(model, n), SamplingParams(max_tokens=3))
    fed = []
    while engine.busy:
        before = engine.stats.prefill_tokens
        engine.step()
        fed.append(engine.stats.prefill_tokens - before)
    assert [n for n in fed if n] == [31 + 11, 31, 81, 6]


def test_same_request_alone_and_in_a_crowd() -> None:
    model = tiny("pre", torch.bfloat16)
    mine = prompt(model, 70, seed=9)
    wanted = SamplingParams(max_tokens=30, n=2, seed=11, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    alone = Engine(model, num_blocks=60).generate([mine], wanted, keys=[42])
    others = [prompt(model, 5 + 13 * i, seed=i) for i in range(7)]
    params = [SamplingParams(max_tokens=4 + 5 * i, n=1 + i % 2, seed=i) for i in range(7)]
    groups = Engine(model, num_blocks=90, max_batch=12).generate(
        [*others[:3], mine, *others[3:]], [*params[:3], wanted, *params[3:]], keys=[0, 1, 2, 42, 3, 4, 5, 6]
    )
    assert numbers([groups[3]]) == numbers(alone)


def test_repetition_penalty_reads_the_target_alone() -> None:
    """Source ids beyond the target vocabulary are no history; tokens already generated are."""
    model = tiny("separate")
    greedy = SamplingParams(temperature=0, max_tokens=12)
    (plain,) = Engine(model, num_blocks=9).generate([prompt(model, 20)], greedy)[0]
    penalised = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=50.0)
    (other,) = Engine(model, num_blocks=9).generate([prompt(model, 20)], penalised)[0]
    assert other.tokens[0] == plain.tokens[0]
    assert len(set(other.tokens)) == 12


def test_weights_swapped_in_mid_flight() -> None:
    model = tiny()
    engine, source = Engine(model, num_blocks=30), prompt(model, 70)
    first = engine.add(source, SamplingParams(max_tokens=20, n=2))
    for _ in range(8):
        engine.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    engine.set_version(3)
    done = []
    while engine.busy:
        done += [e.completion for e in engine.step() if e.completion and e.request_id == first]
    for c in done:
        assert c.mixed_versions
        assert trainer_logprobs(model, [(source, c.tokens)])[0][8:] == c.policy_logprobs[8:]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("shape", ["post", "separate"])
def test_beam_search_is_exhaustive_enumeration(shape: str, alpha: float) -> None:
    """Every sequence over five tokens up to length 4, scored by the trainer; the beam is wide enough to keep all."""
    model, limit = tiny(shape, vocab_size=5), 4
    source = prompt(model, 66 if shape == "post" else 5)
    bodies = [b for n in range(limit) for b in itertools.product([0, 2, 3, 4], repeat=n)]
    whole = [[*b, EOS] for b in bodies] + [list(b) for b in itertools.product([0, 2, 3, 4], repeat=limit)]
    scored = trainer_logprobs(model, [(source, c) for c in whole], share_prompts=True)
    ranked = sorted(zip(whole, scored, strict=True), key=lambda x: -sum(x[1]) / len(x[0]) ** alpha)
    params = SamplingParams(max_tokens=limit, beam_width=5**limit, n=3, length_penalty=alpha)
    engine = Engine(model, num_blocks=700, eos_token_ids=[EOS], max_batch=700)
    found = engine.generate([source], params)[0]
    for c, (tokens, logp) in zip(found, ranked, strict=False):
        assert c.tokens == tokens
        assert c.policy_logprobs == logp


def test_narrow_beams_and_greedy_are_the_trainers_bits_under_preemption() -> None:
    model = tiny("post", torch.bfloat16)
    prompts = [prompt(model, n) for n in (5, 66)]
    params = SamplingParams(max_tokens=70, beam_width=3, n=3)
    wide = Engine(model, num_blocks=60, eos_token_ids=[EOS]).generate(prompts, params)
    tight = Engine(model, num_blocks=7, eos_token_ids=[EOS])
    assert numbers(tight.generate(prompts, params)) == numbers(wide)
    assert tight.stats.preemptions > 0
    assert_exact(model, prompts, wide)
    greedy = Engine(model, num_blocks=60).generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    assert_exact(model, prompts, greedy)


def test_the_targets_room_does_not_depend_on_the_source() -> None:
    model = tiny(max_position_embeddings=12)
    groups = Engine(model, num_blocks=9).generate(
        [prompt(model, 2), prompt(model, 12)], SamplingParams(max_tokens=99, ignore_eos=True)
    )
    for (c,) in groups:
        assert len(c.tokens) == 11
        assert c.finish_reason == "length"


def test_bad_requests() -> None:
    model = tiny("separate", max_position_embeddings=32)
    engine = Engine(model, num_blocks=9)
    good, params = prompt(model, 4), SamplingParams(max_tokens=3)
    for bad, words in (
        (good[:-1], "decoder_start_token_id 0, once"),
        ([PAD], "at least one"),
        ([*good, PAD], "once"),
        (prompt(model, 33), "source has 33 tokens but the encoder holds 32"),
        ([5, PAD], "source token 5 is a target token"),
        ([150, PAD], r"outside the model's vocabulary 0\.\.149"),
    ):
        with pytest.raises(DataError, match=words):
            engine.add(bad, params)
    with pytest.raises(ConfigError, match="does not predict its prompt"):
        engine.add(good, SamplingParams(max_tokens=3, prompt_logprobs=1))
    with pytest.raises(ConfigError, match="logit_bias"):
        engine.add(good, SamplingParams(max_tokens=3, logit_bias={97: 1.0}))
    assert not engine.busy
    assert len(engine.generate([good], params)[0][0].tokens) == 3
