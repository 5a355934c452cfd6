"""Norm, SwiGLU and rotation kernels: against float64 definitions, and the same bits for a row wherever it stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from upslope import kernels
from upslope.kernels import rows

pytestmark = pytest.mark.skipif(kernels.problem() is not None, reason=f"no kernels: {kernels.problem()}")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
WIDTHS = [1, 15, 16, 40, 576]


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu64(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def compare(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = float(expected.abs().max().clamp_min(0.1))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def check(
    fused: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> None:
    """Values and gradients of a kernel against autograd through the definition in float64."""
    dtype = inputs[0].dtype
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found, expected = fused(*ours), plain(*exact)
    torch.manual_seed(1)
    weights = [torch.randn_like(y) for y in expected]
    for y, z in zip(found, expected, strict=True):
        compare(y, z.detach(), dtype)
    torch.autograd.backward(list(found), [w.to(dtype) for w in weights])
    torch.autograd.backward(list(expected), [w.to(dtype).double() for w in weights])
    for x, z in zip(ours, exact, strict=True):
        assert x.grad is not None
        assert z.grad is not None
        compare(x.grad, z.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_follow_their_definition(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta = (torch.randn(7, width).to(dtype) for _ in range(2))
    weight = (torch.rand(width) + 0.5).to(dtype)
    check(lambda x, w: (rows.rms_norm(x, w, 1e-5),), lambda x, w: (norm64(x, w, 1e-5),), [x, weight])

    def plain(x: Tensor, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x + d, norm64(x + d, w, 1e-5)

    check(lambda x, d, w: rows.add_rms_norm(x, d, w, 1e-5), plain, [x, delta, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_follows_its_definition(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = (torch.randn(7, 2 * width) * 3).to(dtype)
    check(lambda b: (rows.swiglu(b),), lambda b: (swiglu64(b),), [both])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_with_the_product_behind_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both, weight = torch.randn(20, 80).to(dtype), torch.randn(24, 40).to(dtype)
    check(lambda b, w: (rows.swiglu_linear(b, w),), lambda b, w: (swiglu64(b) @ w.T,), [both, weight])
    assert torch.equal(rows.swiglu_linear(both, weight), torch.nn.functional.linear(rows.swiglu(both), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 2), (4, 2, 6), (9, 3, 64), (2, 1, 40), (1, 1, 640)])
def test_rotation_turns_pairs_of_halves(heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 5
    both = torch.randn(count, (heads + 2 * kv_heads) * width).to(dtype)
    angles = torch.randn(count, width // 2).double()
    cos, sin = angles.cos().float(), angles.sin().float()

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = x.view(count, -1, width).split([heads, kv_heads, kv_heads], dim=1)

        def turn(y: Tensor) -> Tensor:
            pairs = torch.complex(*y.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
            return torch.cat([pairs.real, pairs.imag], -1)

        return turn(q), turn(k), v

    check(lambda x: rows.split_rotate(x, cos, sin, heads=heads, kv_heads=kv_heads), plain, [both])


def test_hand_computed() -> None:
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(rows.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([[0.848528, 2.262742]]))
    torch.testing.assert_close(rows.swiglu(torch.tensor([[1.0, 0.0, 2.0, 5.0]])), torch.tensor([[1.462117, 0.0]]))
    quarter = rows.split_rotate(
        torch.tensor([[1.0, 2.0, 5.0, 6.0, 7.0, 8.0]]), torch.zeros(1, 1), torch.ones(1, 1), heads=1, kv_heads=1
    )
    assert [t.flatten().tolist() for t in quarter] == [[-2.0, 1.0], [-6.0, 5.0], [7.0, 8.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64, 577])
def test_a_row_has_its_bits_alone_in_company_and_at_any_address(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.rand(width).to(dtype)
    x, delta, both = (
        torch.randn(40, width).to(dtype),
        torch.randn(40, width).to(dtype),
        torch.randn(40, 2 * width).to(dtype),
    )
    total, normed = rows.add_rms_norm(x, delta, weight, 1e-5)
    active = rows.swiglu(both)
    shifted = torch.empty(40 * width + 3, dtype=dtype)[3:].view(40, width)
    shifted.copy_(x)
    moved = rows.add_rms_norm(shifted, delta, weight, 1e-5)
    assert torch.equal(moved[1], normed)
    for i in (0, 17, 39):
        one = rows.add_rms_norm(x[i : i + 1], delta[i : i + 1], weight, 1e-5)
        assert torch.equal(one[0][0], total[i])
        assert torch.equal(one[1][0], normed[i])
        assert torch.equal(rows.swiglu(both[i : i + 1])[0], active[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(300, 96).to(dtype), torch.randn(300, 96).to(dtype), torch.rand(96).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, delta, weight)]
            total, normed = rows.add_rms_norm(*leaves, 1e-5)
            (total.float().sin().sum() + normed.float().cos().sum()).backward()
            found.append([t.grad for t in leaves])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 32)
    clean = rows.rms_norm(x, torch.ones(32), 1e-5)
    x[1, 3] = float("nan")
    found = rows.rms_norm(x, torch.ones(32), 1e-5)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])
    both = torch.randn(2, 32)
    both[0, 0] = float("nan")
    assert rows.swiglu(both)[0, 0].isnan()
    assert rows.swiglu(both)[1].isfinite().all()


def test_extreme_gates_saturate() -> None:
    both = torch.tensor([[-200.0, 200.0, -88.0, 1.0, 1.0, 1.0]])
    assert rows.swiglu(both).tolist()[0][:2] == [0.0, 200.0]
    assert rows.swiglu(both).isfinite().all()
