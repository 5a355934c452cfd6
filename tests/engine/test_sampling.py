"""Sampling: the random numbers, the distribution of every filter, the two log-probs."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from upslope.engine.sampling import Row, adjust, beam_candidates, draw, keep_filtered, sample, uniforms
from upslope.functional.logprobs import token_logprobs
from upslope.types import SamplingParams

VOCAB = 40


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def reference_distribution(logits: list[float], p: SamplingParams, history: list[int], allowed: set[int]) -> np.ndarray:
    """The claimed distribution, from its definition, token by token in float64."""
    scores = list(logits)
    for t in set(history):
        scores[t] = scores[t] / p.repetition_penalty if scores[t] > 0 else scores[t] * p.repetition_penalty
    for t, bias in p.logit_bias.items():
        scores[t] += bias
    weight = {t: math.exp((s - max(scores)) / p.temperature) for t, s in enumerate(scores) if t in allowed}
    order = sorted(weight, key=lambda t: -weight[t])
    if p.top_k:
        order = [t for t in order if weight[t] >= weight[order[min(p.top_k, len(order)) - 1]]]
    total, mass, kept = sum(weight[t] for t in order), 0.0, []
    for t in order:
        if mass / total >= p.top_p:
            break
        kept.append(t)
        mass += weight[t]
    if p.top_p < 1:
        kept = [t for t in order if weight[t] >= weight[kept[-1]]]
    kept = [t for t in kept if weight[t] >= p.min_p * weight[order[0]]]
    probs = np.zeros(len(logits))
    probs[kept] = [weight[t] for t in kept]
    return probs / probs.sum()


def draws(logits: Tensor, params: SamplingParams, count: int, **row: object) -> np.ndarray:
    u = uniforms([3] * count, [1] * count, list(range(count)), [0] * count)
    rows = [Row(params, x, **row) for x in u.tolist()]  # type: ignore[arg-type]
    return np.array(sample(logits.expand(count, -1), rows).tokens)


def test_uniforms_are_the_documented_function_of_their_counters() -> None:
    counters = [(0, 0, 0, 0), (1, 2, 3, 4), (-1, 2**70, 5, 6), (2**63, 7, 0, 1)]
    got = uniforms(*[list(c) for c in zip(*counters, strict=True)])
    for value, four in zip(got, counters, strict=True):
        state = 0
        for c in four:
            state = splitmix64(state ^ (c & (2**64 - 1)))
        assert value == (state >> 11) / 2**53


def test_uniforms_are_uniform_and_uncorrelated_over_each_counter() -> None:
    for axis in range(4):
        counters = [[5] * 20000 for _ in range(4)]
        counters[axis] = list(range(20000))
        u = uniforms(*counters)
        counts = np.histogram(u, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 95  # 49 degrees of freedom, p = 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


FILTERS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7, temperature=1.3),
    "min_p": SamplingParams(min_p=0.1),
    "all three": SamplingParams(top_k=12, top_p=0.8, min_p=0.03, temperature=0.8),
    "penalty": SamplingParams(repetition_penalty=1.7),
    "bias": SamplingParams(logit_bias={3: 2.5, 4: -math.inf}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_sampler_has_the_claimed_distribution(name: str) -> None:
    params, count = FILTERS[name], 6000
    logits = torch.randn(1, VOCAB) * 1.5
    history = [1, 2, 2, 7]
    expected = reference_distribution(logits[0].tolist(), params, history, set(range(VOCAB)))
    counts = np.bincount(draws(logits, params, count, history=history), minlength=VOCAB)
    assert not counts[expected == 0].any()
    big = expected * count >= 5
    observed = np.append(counts[big], counts[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum()) * count
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 8  # far beyond p = 1e-4


@settings(max_examples=100)
@given(st.data())
def test_log_probs_are_those_of_the_claimed_distribution(data: st.DataObject) -> None:
    grid = st.integers(-40, 40).map(lambda x: x / 8)  # coarse: ties are common
    logits = data.draw(st.lists(grid, min_size=2, max_size=30))
    vocab = len(logits)
    allowed = data.draw(st.sets(st.integers(0, vocab - 1), min_size=1))
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, vocab + 3)),
        top_p=data.draw(st.sampled_from([0.05, 0.31, 0.77, 0.95, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.07, 0.53, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.5])),
        logit_bias=data.draw(st.dictionaries(st.integers(0, vocab - 1), st.sampled_from([-1.25, 2.5]), max_size=3)),
    )
    history = data.draw(st.lists(st.integers(0, vocab - 1), max_size=4))
    mask = torch.tensor([t in allowed for t in range(vocab)])
    u = torch.linspace(0, 1 - 2**-53, 41, dtype=torch.float64).tolist()
    logits_NV = torch.tensor(logits).expand(len(u), -1)
    drawn = sample(logits_NV, [Row(params, x, history, mask) for x in u])
    expected = reference_distribution(logits, params, history, allowed)
    seen = dict(zip(drawn.tokens, drawn.sampling_logprobs, strict=True))
    for token, logp in seen.items():
        assert expected[token] == pytest.approx(math.exp(logp), rel=2e-5), repr(params)
    assert drawn.tokens == sorted(drawn.tokens), "the inverse CDF runs in token order"
    policy = token_logprobs(logits_NV, torch.tensor(drawn.tokens), params.temperature).tolist()
    assert policy == drawn.policy_logprobs


def test_kept_probabilities_sum_to_one() -> None:
    logits = torch.randn(1, 3000) * 3
    for params in FILTERS.values():
        rows = [Row(params, u, [1, 2]) for u in np.linspace(0, 1, 400, endpoint=False)]
        drawn = sample(logits.expand(400, -1), rows)
        got = dict(zip(drawn.tokens, drawn.sampling_logprobs, strict=True))
        scores = adjust(logits, rows[:1]) / params.temperature
        kept = keep_filtered(scores, [params.top_k], [params.top_p], [params.min_p])
        support = {int(t) for t in (kept[0] > -math.inf).nonzero()[:, 0]}
        assert set(got) <= support
        logp = token_logprobs(kept.expand(len(support), -1), torch.tensor(sorted(support)))
        assert float(logp.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_nucleus_is_exact_when_it_is_wider_than_the_candidates() -> None:
    logits = torch.randn(2, 5000) * 0.1
    kept = keep_filtered(logits.clone(), [0, 0], [0.9, 1.0], [0.0, 0.0])
    probs = torch.softmax(logits[0].double(), -1)
    order = probs.argsort(descending=True)
    size = int((probs[order].cumsum(0) < 0.9).sum()) + 1
    assert size > 2048
    assert set((kept[0] > -math.inf).nonzero()[:, 0].tolist()) == set(order[:size].tolist())
    assert torch.equal(kept[1], logits[1])


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000])
def test_zero_probability_is_never_drawn(vocab: int) -> None:
    logits = torch.full((1, vocab), -math.inf)
    live = sorted({0 if vocab == 1 else 1, vocab // 2, max(0, vocab - 2)})
    logits[0, live] = torch.tensor([0.1 * i for i in range(len(live))])
    edges = [0.0, 2.0**-53, 0.3, 0.5, 0.999999, 1 - 2.0**-53, 1.0]
    tokens = draw(torch.log_softmax(logits, -1).expand(len(edges), -1), torch.tensor(edges, dtype=torch.float64))
    assert set(tokens.tolist()) <= set(live)
    assert tokens[0] == live[0]
    assert tokens[-1] == live[-1]


def test_inverse_cdf_over_many_chunks_hits_every_interval() -> None:
    logits = torch.randn(1, 1300) * 2
    edges = torch.softmax(logits[0].double(), -1).cumsum(0)
    middles = edges - torch.softmax(logits[0].double(), -1) / 2
    tokens = draw(torch.log_softmax(logits, -1).expand(1300, -1), middles)
    assert tokens.tolist() == list(range(1300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_know_what_stands_beside_it(dtype: torch.dtype) -> None:
    logits = (torch.randn(45, 700) * 3).to(dtype)
    params = [*FILTERS.values(), SamplingParams(temperature=0.0), SamplingParams(logprobs=3)]
    rows = [Row(params[i % len(params)], (i * 0.37) % 1, [1, i]) for i in range(45)]
    together = sample(logits, rows)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1], [row])
        assert together.tokens[i] == alone.tokens[0]
        assert together.sampling_logprobs[i] == alone.sampling_logprobs[0]
        assert together.policy_logprobs[i] == alone.policy_logprobs[0]
        assert together.top_logprobs[i] == alone.top_logprobs[0]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"temperature": 0.5, "top_p": 0.65}, 1),  # at temperature 1 it would be two
        ({"temperature": 0.5, "top_p": 0.7}, 2),  # the token that reaches p belongs to it
        ({"temperature": 0.5, "min_p": 0.1}, 2),  # at temperature 1 it would be all four
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, 1),  # of what top-k left: 0.625
        ({"temperature": 1.0, "top_k": 3, "min_p": 0.5}, 2),
    ],
)
def test_filters_and_both_log_probs_by_hand(params: dict[str, float], kept: int) -> None:
    """Of 0.5, 0.3, 0.15, 0.05 (squared at temperature 0.5): the `kept` largest, their shares, and the policy's own."""
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64) ** (1 / params["temperature"])
    asked, numbers = SamplingParams(**params), [0.0, 0.3, 0.7, 0.999999]  # type: ignore[arg-type]
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * len(numbers)).log()
    drawn = sample(logits, [Row(asked, u) for u in numbers])
    left = shares[:kept] / shares[:kept].sum()
    for u, token, sampling, policy in zip(
        numbers, drawn.tokens, drawn.sampling_logprobs, drawn.policy_logprobs, strict=True
    ):
        assert token == int((left.cumsum(0) <= u).sum())
        assert sampling == pytest.approx(math.log(left[token]), abs=1e-5)
        assert policy == pytest.approx(math.log(shares[token] / shares.sum()), abs=1e-5)


def test_greedy_takes_the_largest_with_certainty() -> None:
    logits = torch.randn(3, VOCAB)
    rows = [Row(SamplingParams(temperature=0.0), 0.9) for _ in range(3)]
    rows[2] = Row(SamplingParams(temperature=0.0, logit_bias={5: 100.0}), 0.9)
    drawn = sample(logits, rows)
    assert drawn.tokens == [*logits[:2].argmax(-1).tolist(), 5]
    assert drawn.sampling_logprobs == [0.0] * 3
    assert drawn.policy_logprobs == token_logprobs(logits, torch.tensor(drawn.tokens)).tolist()


def test_alternatives_are_policy_log_probs_likeliest_first() -> None:
    logits = torch.randn(2, VOCAB)
    drawn = sample(logits, [Row(SamplingParams(logprobs=3, temperature=0.5), 0.99), Row(SamplingParams(), 0.5)])
    top = drawn.top_logprobs[0]
    assert top is not None
    assert drawn.top_logprobs[1] is None
    assert list(top)[:3] == logits[0].topk(3).indices.tolist()
    assert top[drawn.tokens[0]] == drawn.policy_logprobs[0]
    for token, value in top.items():
        assert value == token_logprobs(logits[:1], torch.tensor([token]), 0.5).item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [FILTERS["plain"], FILTERS["all three"], SamplingParams(temperature=0.0)])
def test_bad_logits_are_seen_in_the_log_prob_of_their_row_alone(bad: float, params: SamplingParams) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = bad
    policy = sample(logits, [Row(params, 0.4)] * 3).policy_logprobs
    assert [math.isnan(p) for p in policy] == [False, True, False]
    assert [len(c) for c in beam_candidates(logits, [Row(params)] * 3, [2, 2, 2])] == [2, 0, 2]


def test_row_without_any_allowed_token_is_seen_in_the_sampling_log_prob() -> None:
    nothing = {t: -math.inf for t in range(VOCAB)}
    for temperature in (0.0, 1.0):
        params = SamplingParams(logit_bias=nothing, temperature=temperature)
        drawn = sample(torch.randn(1, VOCAB), [Row(params, 0.5)])
        assert math.isnan(drawn.sampling_logprobs[0])
        assert not math.isnan(drawn.policy_logprobs[0])
