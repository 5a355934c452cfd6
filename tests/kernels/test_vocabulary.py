"""Log-softmax, its gradient and drawing: against float64 definitions, and the same bits whoever asks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.engine.sampling import Row, sample, uniforms
from upslope.functional import logprobs
from upslope.functional.logprobs import entropy, linear_token_logprobs, token_logprobs
from upslope.kernels import problem
from upslope.kernels import rows as vocabulary
from upslope.types import SamplingParams

pytestmark = pytest.mark.skipif(problem() is not None, reason=f"no kernels: {problem()}")

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [1, 5, 15, 16, 63, 64, 97, 2047, 2048, 2049, 8193, 49152]
BAD = [math.nan, math.inf, -math.inf]


def rows(N: int, V: int, dtype: torch.dtype, *, banned: bool = False, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits and one token a row; with `banned` every third logit is -inf, never the token's."""
    logits, tokens = (torch.randn(N, V) * scale).to(dtype), torch.randint(V, (N,))
    if banned:
        keep = logits[torch.arange(N), tokens]
        logits[:, ::3] = -math.inf
        logits[torch.arange(N), tokens] = keep
    return logits, tokens


def definition(logits: Tensor, temperature: float) -> Tensor:
    """log (e^z / sum e^z) in float64."""
    z = logits.double() / temperature
    z = z - z.amax(-1, keepdim=True)
    return z - z.exp().sum(-1, keepdim=True).log()


def entropy_of(logp: Tensor) -> Tensor:
    return -torch.where(logp > -math.inf, logp.exp() * logp, 0.0).sum(-1)


def statistics(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    found = vocabulary.statistics(logits, tokens, temperature, with_entropy=True, with_mean=True)
    assert found.entropy is not None
    assert found.mean is not None
    return found.logp, found.entropy, found.mean


def gradient(logits: Tensor, tokens: Tensor, temperature: float, grads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    found = vocabulary.statistics(logits, tokens, temperature, with_entropy=True)
    return vocabulary.logits_gradient_(logits.clone(), tokens, found, temperature, *grads)


def upstream(N: int) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = torch.randn(3, N)
    return first, second, third


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_against_the_definition(V: int, temperature: float, dtype: torch.dtype) -> None:
    for banned in (False, True):
        logits, tokens = rows(3, V, dtype, banned=banned)
        expected = definition(logits, temperature)
        logp, entropies, means = statistics(logits, tokens, temperature)
        for got, oracle in (
            (logp, expected.gather(1, tokens[:, None])[:, 0]),
            (entropies, entropy_of(expected)),
            (means, expected.mean(-1)),
            (vocabulary.log_softmax(logits, temperature), expected),
        ):
            torch.testing.assert_close(got.double(), oracle, rtol=1e-6, atol=3e-6 / min(temperature, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gradient_against_automatic_differentiation_of_the_definition(
    V: int, temperature: float, dtype: torch.dtype
) -> None:
    logits, tokens = rows(3, V, dtype)
    grads = upstream(3)
    z = logits.double().requires_grad_()
    logp = definition(z, temperature)
    parts = (logp.gather(1, tokens[:, None])[:, 0], entropy_of(logp), logp.mean(-1))
    sum((part * grad).sum() for part, grad in zip(parts, grads, strict=True)).backward()  # type: ignore[union-attr]
    assert z.grad is not None
    precise = dtype == torch.float32
    got = gradient(logits, tokens, temperature, grads)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), z.grad, rtol=2e-5 if precise else 2**-8, atol=3e-6 / temperature)


def test_hand_constants() -> None:
    logits = torch.tensor([[1.0, 3.0]]).log()
    logp, entropies, means = statistics(logits, torch.tensor([1]))
    assert logp.item() == pytest.approx(math.log(3 / 4), abs=1e-7)
    assert entropies.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-7)
    assert means.item() == pytest.approx((math.log(3 / 4) + math.log(1 / 4)) / 2, abs=1e-7)
    found = vocabulary.statistics(logits, torch.tensor([1]), 0.5)
    assert found.logp.item() == pytest.approx(math.log(9 / 10), abs=1e-7)
    d_logits = vocabulary.logits_gradient_(logits, torch.tensor([1]), found, 0.5, torch.tensor([1.0]))
    assert d_logits.tolist()[0] == pytest.approx([-0.2, 0.2], abs=1e-6)  # (1[token] - p) / temperature


def test_a_peaked_row() -> None:
    """One token has all but 1e-9 of the probability: its log-prob is not lost in the others' sum, nor they in it."""
    V = 49152
    logits = torch.zeros(1, V)
    logits[0, 700] = 32.0
    logp = vocabulary.log_softmax(logits, 1.0)[0]
    assert logp[700].item() == pytest.approx(-(V - 1) * math.exp(-32), abs=1e-7)
    assert logp[0].item() == -32.0
    _, entropies, _ = statistics(logits, torch.tensor([700]))
    assert entropies.item() == pytest.approx(33 * (V - 1) * math.exp(-32), abs=1e-7)


def test_banned_tokens_have_no_part_in_the_gradient() -> None:
    logits, tokens = rows(2, 100, torch.float32, banned=True)
    first, second, _ = upstream(2)
    found = vocabulary.statistics(logits, tokens, 1.0, with_entropy=True)
    d_logits = vocabulary.logits_gradient_(logits.clone(), tokens, found, 1.0, first, second)
    assert d_logits.isfinite().all()
    assert (d_logits[logits == -math.inf] == 0).all()


@pytest.mark.parametrize("V", SIZES)
def test_identities(V: int) -> None:
    """Probabilities sum to 1; shifting all logits changes nothing, so that a gradient row sums to 0."""
    logits, tokens = rows(4, V, torch.float32)
    total = vocabulary.log_softmax(logits, 0.8).double().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(4).double(), rtol=0, atol=2e-6)
    sums = gradient(logits, tokens, 0.8, upstream(4)).double().sum(-1)
    torch.testing.assert_close(sums, torch.zeros(4).double(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [5, 97, 2049, 5000])
def test_a_row_has_the_same_bits_alone_anywhere_and_for_any_number_of_threads(V: int, dtype: torch.dtype) -> None:
    N, temperature = 7, 0.7
    logits, tokens = rows(N, V, dtype)
    grads, uniform = upstream(N), torch.rand(N, dtype=torch.float64)

    def everything(x: Tensor, which: slice) -> list[Tensor]:
        part = tuple(g[which] for g in grads)
        return [
            *statistics(x, tokens[which], temperature),
            vocabulary.log_softmax(x, temperature),
            gradient(x, tokens[which], temperature, part),  # type: ignore[arg-type]
            *vocabulary.sample(x, uniform[which], temperature),
        ]

    torch.set_num_threads(1)
    together = everything(logits, slice(None))
    torch.set_num_threads(2)
    for one, two in zip(together, everything(logits, slice(None)), strict=True):
        assert torch.equal(one, two)
    for i in range(N):
        for offset in (0, 1, 3, 8, 31):
            buffer = torch.empty(offset + V, dtype=dtype)
            buffer[offset:] = logits[i]
            alone = everything(buffer[None, offset:], slice(i, i + 1))
            for a, b in zip(alone, together, strict=True):
                assert torch.equal(a[0], b[i]), (i, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_space_between_them(dtype: torch.dtype) -> None:
    """Rows need not follow each other, and what lies between them is left as it is."""
    logits, tokens = rows(5, 70, dtype)
    wide = torch.full((5, 83), math.nan, dtype=dtype)
    wide[:, 4:74] = logits
    apart = wide[:, 4:74]
    for a, b in zip(statistics(apart, tokens), statistics(logits, tokens), strict=True):
        assert torch.equal(a, b)
    found = vocabulary.statistics(apart, tokens, 1.0)
    grad = torch.randn(5)
    expected = vocabulary.logits_gradient_(logits.clone(), tokens, found, 1.0, grad)
    assert vocabulary.logits_gradient_(apart, tokens, found, 1.0, grad).data_ptr() == apart.data_ptr()
    assert torch.equal(apart, expected)
    assert wide[:, :4].isnan().all()
    assert wide[:, 74:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("V", [5, 2500])
def test_a_bad_row_is_nan_and_changes_no_other(V: int, bad: float, dtype: torch.dtype) -> None:
    logits, tokens = rows(4, V, dtype)
    grads, uniform = upstream(4), torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    dirty = logits.clone()
    if bad == -math.inf:
        dirty[2] = bad
    else:
        dirty[2, V - 2] = bad
    good = [0, 1, 3]
    results = []
    for x in (logits, dirty):
        drawn, logp = vocabulary.sample(x, uniform, 1.0)
        full = vocabulary.log_softmax(x, 1.0)
        results.append([drawn, logp, full, *statistics(x, tokens), gradient(x, tokens, 1.0, grads)])
    for clean, spoilt in zip(*results, strict=True):
        assert torch.equal(clean[good], spoilt[good])
    drawn, *others = results[1]
    assert 0 <= int(drawn[2]) < V
    assert all(x[2].isnan().all() for x in others)


class TestOneNumberEverywhere:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sampler_and_trainer(self, dtype: torch.dtype, temperature: float) -> None:
        """Whatever the row's kind, its policy log-prob is linear_token_logprobs of the same hidden states."""
        D, V = 48, 3001
        kinds = [
            SamplingParams(temperature=temperature),
            SamplingParams(temperature=temperature, logprobs=4),
            SamplingParams(temperature=temperature, top_k=9, logprobs=2),
            SamplingParams(temperature=temperature, top_p=0.8),
            SamplingParams(temperature=temperature, min_p=0.1, repetition_penalty=1.3, logit_bias={3: 1.5}),
        ]
        N = 8 * len(kinds)
        hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).div(4).to(dtype)
        logits = F.linear(hidden, weight)
        drawn = sample(logits, [Row(kinds[i % len(kinds)], i / N, [1, 2]) for i in range(N)])
        tokens = torch.tensor(drawn.tokens)
        trained = linear_token_logprobs(hidden, weight, tokens, chunk=13, temperature=temperature)
        assert drawn.policy_logprobs == trained.tolist() == token_logprobs(logits, tokens, temperature).tolist()
        for token, own, top in zip(drawn.tokens, drawn.policy_logprobs, drawn.top_logprobs, strict=True):
            assert top is None or top[token] == own
        plain = [i for i in range(N) if i % len(kinds) < 2]
        assert [drawn.sampling_logprobs[i] for i in plain] == [drawn.policy_logprobs[i] for i in plain]
        greedy = sample(logits, [Row(SamplingParams(temperature=0.0))] * N)
        trained = linear_token_logprobs(hidden, weight, torch.tensor(greedy.tokens))
        assert greedy.policy_logprobs == trained.tolist()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_entropy_and_statistics_asked_for_together_or_alone(self, dtype: torch.dtype) -> None:
        logits, tokens = rows(5, 3000, dtype)
        logp, entropies, _ = statistics(logits, tokens, 0.9)
        assert torch.equal(logp, vocabulary.statistics(logits, tokens, 0.9).logp)
        assert torch.equal(logp, vocabulary.log_softmax(logits, 0.9).gather(1, tokens[:, None])[:, 0])
        assert torch.equal(entropies, entropy(logits, 0.9))

    def test_a_temperature_divides_the_float32_logits(self) -> None:
        logits, tokens = rows(5, 300, torch.bfloat16)
        assert torch.equal(token_logprobs(logits, tokens, 0.7), token_logprobs(logits.float() / 0.7, tokens))


class TestDifferentiation:
    @pytest.mark.parametrize("with_further", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kept_logits_and_those_computed_again(
        self, dtype: torch.dtype, with_further: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        N, D, V = 50, 24, 700
        hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).div(4).to(dtype)
        tokens, grads = torch.randint(V, (N,)), upstream(N)
        grads[0][::4] = grads[1][::4] = grads[2][::4] = 0
        grads[0][16:32] = 1
        results = []
        for room in (0, 20 * V * hidden.element_size(), 2**29):
            monkeypatch.setattr(logprobs, "KEPT_LOGITS_BYTES", room)
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            parts = linear_token_logprobs(
                h, w, tokens, chunk=16, temperature=0.7, with_entropy=with_further, with_mean=with_further
            )
            parts = parts if isinstance(parts, tuple) else (parts,)
            loss = torch.stack([(part * grad).sum() for part, grad in zip(parts, grads, strict=False)]).sum()
            first = torch.autograd.grad(loss, (h, w), retain_graph=True)
            again = torch.autograd.grad(loss, (h, w))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            results.append(first)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
        precise = hidden.double().requires_grad_(), weight.double().requires_grad_()
        logp = definition(F.linear(*precise), 0.7)
        parts = (logp.gather(1, tokens[:, None])[:, 0], entropy_of(logp), logp.mean(-1))[: 3 if with_further else 1]
        torch.stack([(part * grad).sum() for part, grad in zip(parts, grads, strict=False)]).sum().backward()
        for got, exact in zip(results[0], precise, strict=True):
            assert exact.grad is not None
            error = (got.double() - exact.grad).norm() / exact.grad.norm()
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)

    @pytest.mark.parametrize("function", [token_logprobs, entropy])
    def test_logits_that_need_a_gradient_once_and_twice(self, function: object) -> None:
        logits, tokens = rows(3, 40, torch.float32, scale=1.0)
        results = []
        for x in (logits.clone().requires_grad_(), logits.double().requires_grad_()):
            value = token_logprobs(x, tokens, 0.8) if function is token_logprobs else entropy(x, 0.8)
            (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            results.append((first.double(), second.double()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class TestDrawing:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("temperature", [0.6, 1.0])
    def test_frequencies(self, temperature: float, dtype: torch.dtype) -> None:
        """Pearson's chi-square over 60 bins of a vocabulary of three chunks."""
        V, count = 5000, 20000
        logits, _ = rows(1, V, dtype, scale=1.5)
        u = torch.from_numpy(uniforms([3] * count, [1] * count, range(count), [0] * count))
        tokens, _ = vocabulary.sample(logits.expand(count, -1), u, temperature)
        bins = torch.arange(V) * 60 // V
        wanted = torch.zeros(60).double().index_add_(0, bins, definition(logits, temperature)[0].exp()) * count
        observed = torch.bincount(bins[tokens], minlength=60)
        assert float(((observed - wanted) ** 2 / wanted).sum()) < 112  # 59 degrees of freedom, p = 4e-5

    @pytest.mark.parametrize("V", [1, 5, 2047, 2048, 2049, 6000])
    def test_every_interval_is_hit_in_token_order(self, V: int) -> None:
        logits, _ = rows(1, V, torch.float32, scale=1.0)
        probs = definition(logits, 1.0)[0].exp()
        middles = probs.cumsum(0) - probs / 2
        tokens, logp = vocabulary.sample(logits.expand(V, -1), middles, 1.0)
        assert tokens.tolist() == list(range(V))
        assert torch.equal(logp, vocabulary.log_softmax(logits, 1.0)[0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("V", [1, 5, 64, 2049, 4096, 9000])
    def test_the_ends_and_tokens_of_probability_zero(self, V: int, dtype: torch.dtype) -> None:
        logits = torch.full((1, V), -math.inf)
        live = sorted({0 if V == 1 else 1, V // 2, max(0, V - 2)})
        logits[0, live] = torch.tensor([0.1 * i for i in range(len(live))])
        if V > 5:
            logits[0, [0, V - 1]] = -200.0  # e^-200 is 0 too
        edges = torch.tensor([0.0, 2.0**-53, 0.3, 0.5, 0.999999, 1 - 2.0**-53, 1.0], dtype=torch.float64)
        tokens, logp = vocabulary.sample(logits.to(dtype).expand(len(edges), -1), edges, 1.0)
        assert set(tokens.tolist()) <= set(live)
        assert tokens[0] == live[0]
        assert tokens[-2] == tokens[-1] == live[-1]
        assert logp.isfinite().all()

    def test_a_certain_token(self) -> None:
        logits = torch.full((3, 3000), -1e4)
        logits[:, 2500] = 1e4
        tokens, logp = vocabulary.sample(logits, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64), 1.0)
        assert tokens.tolist() == [2500] * 3
        assert logp.tolist() == [0.0] * 3
