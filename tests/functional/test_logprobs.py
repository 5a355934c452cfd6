"""Token log-probs (rows 14, 16, 38), the chunked linear form and its exactness (row 41)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from upslope.functional import logprobs
from upslope.functional.logprobs import entropy, linear_token_logprobs, log_softmax, token_logprobs
from upslope.functional.masking import masked_sum

from . import definitions


def test_hand_constants() -> None:
    logits = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]).log()
    logits[0, 1] = 0
    assert token_logprobs(logits, torch.tensor([[1, 0]])).tolist()[0] == pytest.approx([math.log(3 / 4), math.log(0.5)])
    assert entropy(logits).tolist()[0] == pytest.approx([-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_row14_against_the_definition(temperature: float) -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64) * 5
    tokens = torch.randint(7, (3, 4))
    rows = [[definitions.log_softmax(z, temperature) for z in row] for row in logits.tolist()]
    oracle = [[rows[b][t][int(tokens[b, t])] for t in range(4)] for b in range(3)]
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature), torch.tensor(oracle).double())
    oracle = [[-math.fsum(math.exp(x) * x for x in r) for r in row] for row in rows]
    torch.testing.assert_close(entropy(logits, temperature), torch.tensor(oracle).double())


def test_row14_temperature_divides_the_float32_logits() -> None:
    logits = torch.randn(5, 11).bfloat16()
    tokens = torch.randint(11, (5,))
    expected = F.log_softmax(logits.double() / 0.7, dim=-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(token_logprobs(logits, tokens, 0.7), token_logprobs(logits.float() / 0.7, tokens))
    torch.testing.assert_close(token_logprobs(logits, tokens, 0.7).double(), expected, rtol=0, atol=1e-6)


def test_row16_no_hidden_shift() -> None:
    """A model that copies the token before: row t of its logits predicts token t when the caller lines them up."""
    tokens = torch.tensor([[2, 2, 2, 5, 5]])
    logits = F.one_hot(tokens[:, :-1], 6).float() * 50
    assert token_logprobs(logits, tokens[:, 1:]).exp().round().tolist() == [[1, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_row38_dtypes_and_large_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    for token in range(3):
        value = token_logprobs(logits, torch.tensor([token]))
        assert value.isfinite().all()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert entropy(logits).item() == 0


def test_entropy_with_banned_tokens_and_its_gradient() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0], requires_grad=True)
    value = entropy(logits)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    z = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(entropy(z), Categorical(logits=z).entropy())
    assert torch.autograd.gradcheck(lambda x: entropy(x, 0.7), (z,))
    # dH / dz = -p (log p + H)
    (gradient,) = torch.autograd.grad(entropy(z).sum(), z)
    log_p = log_softmax(z)
    torch.testing.assert_close(gradient, -log_p.exp() * (log_p + entropy(z).unsqueeze(-1)))


def test_row04_nan_rows_change_nothing() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    tokens = torch.tensor([0, 1, 2, 3])
    mask = torch.tensor([1, 0, 1, 0])
    dirty = logits.detach().clone()
    dirty[1], dirty[3, 2] = math.nan, math.nan
    dirty.requires_grad_()
    results = []
    for z in (logits, dirty):
        value = masked_sum(token_logprobs(z, tokens), mask) + masked_sum(entropy(z), mask)
        value.backward()
        results.append((value.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert token_logprobs(dirty, tokens).isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("logits", "tokens", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 2, dtype=torch.long), r"\[2, 3, 4\].*\[2, 2\]"),
        (torch.zeros(2, 4), torch.tensor([0, 4]), r"0\.\.3, got 0\.\.4"),
        (torch.zeros(2, 4), torch.tensor([0, -100]), r"got -100\.\.0"),
        (torch.zeros(2, 4), torch.zeros(2), "float32"),
    ],
)
def test_wrong_arguments_are_refused(logits: Tensor, tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, tokens)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_wrong_temperatures_are_refused(temperature: float) -> None:
    for call in (
        lambda: token_logprobs(torch.zeros(1, 4), torch.tensor([0]), temperature),
        lambda: entropy(torch.zeros(1, 4), temperature),
        lambda: linear_token_logprobs(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([0]), temperature=temperature),
    ):
        with pytest.raises(ValueError, match="temperature"):
            call()


def head(N: int, D: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (N,), generator=g)


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("D", "V"), [(64, 1000), (96, 4099), (576, 2048)])
    def test_row41_same_bits_as_the_full_logits_for_any_chunk_and_any_rows(
        self, D: int, V: int, dtype: torch.dtype
    ) -> None:
        hidden, weight, tokens = head(70, D, V, dtype)
        full = token_logprobs(F.linear(hidden, weight), tokens, 0.7)
        for chunk in (1, 3, 4, 5, 9, 12, 13, 64, 69, 1000):
            assert torch.equal(linear_token_logprobs(hidden, weight, tokens, chunk=chunk, temperature=0.7), full), chunk
        for n in (1, 2, 3, 5, 7, 9, 11, 12, 17):
            rows = torch.arange(n) * 4
            part = linear_token_logprobs(hidden[rows], weight, tokens[rows], temperature=0.7)
            assert torch.equal(part, full[rows]), n

    def test_row41_the_row_counts_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every product has 4, 8 or at least 12 rows, and never more than the chunk asks for."""
        seen: list[int] = []

        def spy(x: Tensor, w: Tensor) -> Tensor:
            seen.append(x.shape[0])
            return x @ w.t()

        monkeypatch.setattr(logprobs.F, "linear", spy)
        hidden, weight, tokens = head(29, 8, 600, torch.float32)
        for n in range(1, 30):
            linear_token_logprobs(hidden[:n], weight, tokens[:n], chunk=14)
        assert set(seen) == {4, 8, 12, 13, 14}
        seen.clear()
        hidden, weight, tokens = head(29, 8, 5, torch.float32)
        linear_token_logprobs(hidden, weight, tokens, chunk=14)
        assert min(seen) * weight.numel() > 16**3, "tiny products take another kernel in bfloat16"

    @pytest.mark.parametrize("with_entropy", [False, True])
    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_gradient_against_numerical_differences(self, chunk: int, with_entropy: bool) -> None:
        hidden, weight, tokens = head(7, 4, 5, torch.float64)

        def function(h: Tensor, w: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return linear_token_logprobs(h, w, tokens, chunk=chunk, temperature=1.3, with_entropy=with_entropy)

        assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))

    def test_gradient_equals_the_unchunked_form(self) -> None:
        hidden, weight, tokens = head(40, 16, 50, torch.float64)
        upstream = torch.randn(40, dtype=torch.float64)
        upstream[::3] = 0
        results = []
        for form in ("full", "chunked"):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            if form == "full":
                logits = F.linear(h, w)
                logp, ent = token_logprobs(logits, tokens, 0.8), entropy(logits, 0.8)
            else:
                logp, ent = linear_token_logprobs(h, w, tokens, chunk=16, temperature=0.8, with_entropy=True)
            ((logp * upstream).sum() + 0.1 * ent.square().sum()).backward()
            results.append((logp.detach(), ent.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def test_entropy_is_the_same_bits(self) -> None:
        hidden, weight, tokens = head(20, 64, 300, torch.float32)
        _, ent = linear_token_logprobs(hidden, weight, tokens, chunk=7, with_entropy=True)
        assert torch.equal(ent, entropy(F.linear(hidden, weight)))

    @pytest.mark.parametrize("chunk", [1, 3, 100])
    @pytest.mark.parametrize("with_entropy", [False, True])
    def test_mean_against_the_definition_and_numerical_differences(self, chunk: int, with_entropy: bool) -> None:
        hidden, weight, tokens = head(7, 4, 5, torch.float64)

        def function(h: Tensor, w: Tensor) -> Tensor | tuple[Tensor, ...]:
            return linear_token_logprobs(
                h, w, tokens, chunk=chunk, temperature=1.3, with_entropy=with_entropy, with_mean=True
            )

        logp, *further = function(hidden, weight)
        assert len(further) == 1 + with_entropy
        rows = [definitions.log_softmax(z, 1.3) for z in F.linear(hidden, weight).tolist()]
        oracle = torch.tensor([math.fsum(row) / len(row) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(further[-1], oracle)
        assert torch.equal(logp, linear_token_logprobs(hidden, weight, tokens, temperature=1.3))
        assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))

    def test_mean_gradient_equals_the_unchunked_form_where_only_the_mean_has_one(self) -> None:
        hidden, weight, tokens = head(40, 16, 50, torch.float64)
        upstream = torch.randn(40, dtype=torch.float64)
        upstream[::3] = 0
        results = []
        for chunked in (False, True):
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            if chunked:
                _, mean = linear_token_logprobs(h, w, tokens, chunk=16, with_mean=True)
            else:
                mean = log_softmax(F.linear(h, w)).mean(-1)
            (mean * upstream).sum().backward()
            results.append((mean.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def test_float32_gradient_does_not_depend_on_the_chunk(self) -> None:
        hidden, weight, tokens = head(64, 32, 500, torch.float32)
        gradients = []
        for chunk in (4, 16, 64):
            w = weight.clone().requires_grad_()
            linear_token_logprobs(hidden, w, tokens, chunk=chunk).sum().backward()
            gradients.append(w.grad)
        for other in gradients[1:]:
            assert (other - gradients[0]).norm() < 1e-6 * gradients[0].norm()

    def test_bfloat16_gradient_is_accumulated_in_float32(self) -> None:
        """300 equal rows, one per chunk: a bfloat16 sum stalls at 256 times its summands."""
        hidden, weight, tokens = head(1, 4, 6, torch.bfloat16)
        w = weight.clone().requires_grad_()
        linear_token_logprobs(hidden, w, tokens).sum().backward()
        many = weight.clone().requires_grad_()
        linear_token_logprobs(hidden.repeat(300, 1), many, tokens.repeat(300), chunk=1).sum().backward()
        assert many.grad.dtype == torch.bfloat16
        torch.testing.assert_close(many.grad.float(), 300 * w.grad.float(), rtol=2**-8, atol=0)

    def test_only_what_needs_a_gradient_gets_one(self) -> None:
        hidden, weight, tokens = head(9, 4, 6, torch.float32)
        h = hidden.clone().requires_grad_()
        linear_token_logprobs(h, weight, tokens).sum().backward()
        assert h.grad is not None
        assert weight.grad is None
        w = weight.clone().requires_grad_()
        linear_token_logprobs(hidden, w, tokens).sum().backward()
        assert w.grad is not None

    def test_row04_a_masked_nan_row_changes_nothing(self) -> None:
        hidden, weight, tokens = head(9, 4, 6, torch.float32)
        mask = torch.ones(9).bool()
        mask[[2, 7]] = False
        results = []
        for junk in (0.0, math.nan):
            h, w = hidden.clone(), weight.clone().requires_grad_()
            h[~mask] = junk
            h.requires_grad_()
            value = masked_sum(linear_token_logprobs(h, w, tokens, chunk=4), mask)
            value.backward()
            results.append((value.detach(), h.grad, w.grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_no_rows(self) -> None:
        h, w = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
        value = linear_token_logprobs(h, w, torch.zeros(0, dtype=torch.long))
        assert value.shape == (0,)
        value.sum().backward()
        assert w.grad is not None
        assert (w.grad == 0).all()

    def test_never_holds_all_logits(self) -> None:
        """The largest tensor made is the chunk's, in forward and in backward."""
        N, V, chunk = 256, 3001, 16
        hidden, weight, tokens = head(N, 8, V, torch.float32)
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                for x in result if isinstance(result, (tuple, list)) else [result]:
                    if isinstance(x, Tensor):
                        largest = max(largest, x.numel())
                return result

        with Watch():
            linear_token_logprobs(
                hidden.requires_grad_(), weight.requires_grad_(), tokens, chunk=chunk
            ).sum().backward()
        assert largest == chunk * V

    def test_a_second_derivative_is_refused(self) -> None:
        hidden, weight, tokens = head(3, 4, 5, torch.float64)
        value = linear_token_logprobs(hidden.requires_grad_(), weight, tokens).square().sum()
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    @pytest.mark.parametrize(
        ("hidden", "weight", "tokens", "message"),
        [
            (torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(2).long(), r"\[2, 3\].*\[5, 4\]"),
            (torch.zeros(2, 3), torch.zeros(5, 3).bfloat16(), torch.zeros(2).long(), "bfloat16"),
            (torch.zeros(1, 2, 3), torch.zeros(5, 3), torch.zeros(2).long(), r"\[1, 2, 3\]"),
            (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(3).long(), r"got torch.int64 \[3\]"),
            (torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 5]), r"0\.\.4"),
        ],
    )
    def test_wrong_arguments_are_refused(self, hidden: Tensor, weight: Tensor, tokens: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(hidden, weight, tokens)

    def test_a_wrong_chunk_is_refused(self) -> None:
        hidden, weight, tokens = head(3, 4, 5, torch.float32)
        with pytest.raises(ValueError, match="chunk"):
            linear_token_logprobs(hidden, weight, tokens, chunk=0)
