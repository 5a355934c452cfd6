"""Frequency and presence penalty: what a token loses, in which order, and that nothing but its own sample matters."""

from __future__ import annotations

import math
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from upslope.engine import Engine, sampling
from upslope.engine.sampling import Row, adjust, beam_candidates, sample
from upslope.errors import ConfigError
from upslope.functional.logprobs import log_softmax, token_logprobs
from upslope.models.attention.context import PackedContext
from upslope.models.decoder.network import Decoder
from upslope.types import Completion, SamplingParams

from .tiny import assert_exact, prompt, tiny

BOTH = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)


def penalised(logits: list[float], p: SamplingParams, history: list[int], generated: list[int]) -> np.ndarray:
    """The claimed log-probs at this temperature, token by token in float64; no filters."""
    scores, counts = np.array(logits, dtype=np.float64), Counter(generated)
    for t in range(len(scores)):
        if t in history:
            scores[t] = scores[t] / p.repetition_penalty if scores[t] > 0 else scores[t] * p.repetition_penalty
        scores[t] -= counts[t] * p.frequency_penalty + (counts[t] > 0) * p.presence_penalty
        scores[t] += p.logit_bias.get(t, 0.0)
    scores /= p.temperature
    return scores - scores.max() - math.log(np.exp(scores - scores.max()).sum())


def numbers(groups: list[list[Completion]]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(c.tokens, c.policy_logprobs, c.sampling_logprobs) for group in groups for c in group]


def test_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4, -1)
    drawn = [0, 2, 0]
    rows = [
        Row(BOTH, history=[3], generated=drawn),
        Row(SamplingParams(frequency_penalty=-2.0), generated=drawn),
        Row(SamplingParams(presence_penalty=2.0), generated=drawn),
        Row(BOTH, history=[0, 1, 2, 3]),
    ]
    expected = [[0.75, 1.0, -0.75, -1.0], [6.0, 1.0, 2.0, -1.0], [0.0, 1.0, -2.0, -1.0], [2.0, 1.0, 0.0, -1.0]]
    assert adjust(logits, rows).tolist() == expected


def test_after_the_repetition_penalty_and_before_the_bias() -> None:
    params = SamplingParams(repetition_penalty=4.0, frequency_penalty=1.0, presence_penalty=0.5, logit_bias={0: 8.0})
    row = Row(params, history=[0, 0, 1], generated=[0, 0])
    # 2 / 4 - 2 * 1 - 0.5 + 8; penalised the other way round it would be (2 - 2.5) * 4 + 8
    assert adjust(torch.tensor([[2.0, -1.0, 3.0]]), [row]).tolist() == [[6.0, -4.0, 3.0]]


@settings(max_examples=60)
@given(st.data())
def test_log_probs_are_those_of_the_definition(data: st.DataObject) -> None:
    logits = data.draw(st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=20))
    vocab = len(logits)
    tokens = st.integers(0, vocab - 1)
    penalty = st.floats(-2, 2)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        frequency_penalty=data.draw(penalty),
        presence_penalty=data.draw(penalty),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
        logit_bias=data.draw(st.dictionaries(tokens, st.floats(-3, 3), max_size=2)),
    )
    history, generated = data.draw(st.lists(tokens, max_size=4)), data.draw(st.lists(tokens, max_size=9))
    u = torch.linspace(0, 1 - 2**-53, 31, dtype=torch.float64).tolist()
    logits_NV = torch.tensor(logits).expand(len(u), -1)
    drawn = sample(logits_NV, [Row(params, x, history, generated=generated) for x in u])
    expected = penalised(logits, params, history, generated)
    assert drawn.sampling_logprobs == pytest.approx(expected[drawn.tokens].tolist(), abs=1e-5)
    assert drawn.policy_logprobs == token_logprobs(logits_NV, torch.tensor(drawn.tokens), params.temperature).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_what_stands_beside_it(dtype: torch.dtype) -> None:
    logits = (torch.randn(24, 300) * 3).to(dtype)
    kinds = [BOTH, SamplingParams(), SamplingParams(frequency_penalty=2.0, temperature=0.0), SamplingParams(top_k=9)]
    rows = [Row(kinds[i % 4], (i * 0.37) % 1, generated=[i] * (i % 3)) for i in range(24)]
    together = sample(logits, rows)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert together.tokens[i] == alone.tokens[0]
        assert together.sampling_logprobs[i] == alone.sampling_logprobs[0]
        assert together.policy_logprobs[i] == alone.policy_logprobs[0]


def test_beams_are_ranked_by_the_penalised_distribution() -> None:
    logits = torch.tensor([[3.0, 2.5, 1.5, 0.0]])
    row = Row(SamplingParams(beam_width=3, presence_penalty=2.0), generated=[0])
    (found,) = beam_candidates(logits, [row], [3])
    assert [c.token for c in found] == [1, 2, 0]
    expected = penalised(logits[0].tolist(), row.params, [], [0])
    assert [c.sampling_logprob for c in found] == pytest.approx(expected[[1, 2, 0]].tolist())
    assert [c.policy_logprob for c in found] == log_softmax(logits, 1.0)[0, [1, 2, 0]].tolist()


@pytest.mark.parametrize("params", [{"frequency_penalty": 0.5}, {"presence_penalty": -0.5}])
def test_penalised_samples_are_filtered_and_not_plain(params: dict[str, float]) -> None:
    assert SamplingParams(**params).filtered  # type: ignore[arg-type]
    assert not Row(SamplingParams(**params)).plain  # type: ignore[arg-type]
    assert not SamplingParams().filtered


def test_plain_rows_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a plain row was adjusted")

    monkeypatch.setattr(sampling, "adjust", refuse)
    engine = Engine(tiny(), num_blocks=8)
    seen: list[Row] = []
    monkeypatch.setattr("upslope.engine.outputs.sample", lambda logits, rows: seen.extend(rows) or sample(logits, rows))
    engine.generate([prompt(9)] * 2, [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4, temperature=0.0)])
    assert len(seen) == 8
    assert not any(row.generated or row.history for row in seen)


# In the engine


def oracle_choice(model: Decoder, tokens: list[int], start: int, params: SamplingParams) -> tuple[int, np.ndarray]:
    """The greedy token and all its rivals' log-probs, from one forward pass over the whole sequence."""
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), PackedContext([len(tokens)]))[-1:]
        logits = torch.nn.functional.linear(hidden, model.head_weight)[0].float().tolist()
    logp = penalised(logits, params, [], tokens[start:])
    return int(logp.argmax()), logp


def test_greedy_decoding_follows_the_definition() -> None:
    model, start = tiny(vocab=30), prompt(12, vocab=30)
    params = SamplingParams(max_tokens=25, temperature=1.0, frequency_penalty=1.1, presence_penalty=0.7)
    greedy = SamplingParams(max_tokens=25, temperature=0.0, frequency_penalty=1.1, presence_penalty=0.7)
    engine = Engine(model, num_blocks=8)
    (found,), (plain,) = engine.generate([start] * 2, [greedy, SamplingParams(max_tokens=25, temperature=0.0)])
    tokens = list(start)
    for token in found.tokens:
        assert token == oracle_choice(model, tokens, len(start), params)[0]
        tokens.append(token)
    assert max(Counter(found.tokens).values()) < max(Counter(plain.tokens).values())


def test_sampled_log_probs_are_those_of_the_definition_and_the_prompt_does_not_count() -> None:
    model, start = tiny(vocab=30), prompt(40, vocab=30)
    params = SamplingParams(max_tokens=20, temperature=0.8, frequency_penalty=0.9, presence_penalty=-0.4, seed=3)
    (found,) = Engine(model, num_blocks=8).generate([start], params)[0]
    assert found.sampling_logprobs[0] == pytest.approx(found.policy_logprobs[0], abs=1e-6)
    tokens = list(start)
    for token, logp in zip(found.tokens, found.sampling_logprobs, strict=True):
        assert logp == pytest.approx(oracle_choice(model, tokens, len(start), params)[1][token], abs=1e-4)
        tokens.append(token)
    assert found.sampling_logprobs[1:] != pytest.approx(found.policy_logprobs[1:], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_cached_prefixes_and_preemptions_change_nothing(dtype: torch.dtype) -> None:
    model, prompts = tiny(dtype=dtype), [prompt(n) for n in (1, 40, 63, 64, 65, 130)]
    params = SamplingParams(max_tokens=40, n=3, seed=5, frequency_penalty=0.6, presence_penalty=0.3)
    plain = Engine(model, num_blocks=80, prefix_cache=False)
    expected = plain.generate(prompts, params)
    assert plain.stats.preemptions == 0
    assert_exact(model, prompts, expected)  # the policy's log-probs know of no penalty

    chunked = Engine(model, num_blocks=80, prefill_tokens=17, max_batch=5, prefix_cache=False)
    assert numbers(chunked.generate(prompts, params)) == numbers(expected)

    crowded = Engine(model, num_blocks=5, max_batch=7)
    assert numbers(crowded.generate(prompts, params)) == numbers(expected)
    assert crowded.stats.preemptions > 0

    cached = Engine(model, num_blocks=80)
    cached.generate(prompts, params)
    before = cached.stats.cached_tokens
    assert numbers(cached.generate(prompts, params)) == numbers(expected)
    assert cached.stats.cached_tokens > before


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [2.01, -2.01, math.nan, math.inf])
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    engine = Engine(tiny(), num_blocks=4)
    with pytest.raises(ConfigError, match=rf"{name} = .*must be in \[-2, 2\]"):
        engine.add([1], SamplingParams(**{name: value}))  # type: ignore[arg-type]
    for edge in (-2.0, 2.0):
        engine.add([1], SamplingParams(**{name: edge}, max_tokens=1))  # type: ignore[arg-type]
