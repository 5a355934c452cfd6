"""Several linear layers as one product: the same numbers, each parameter its own gradient, nothing assumed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from upslope.kernels.products import joined_linear, lay_end_to_end


def layers(*, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(12, width, bias=bias).double() for width in (8, 4, 4)]


def apart(x: Tensor, made: list[nn.Linear]) -> Tensor:
    return torch.cat([layer(x) for layer in made], dim=-1)


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_layers(bias: bool) -> None:
    made, plain = layers(bias=bias), layers(bias=bias)
    lay_end_to_end(*made)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = joined_linear(x, *made), apart(y, plain)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    out.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    for a, b in zip(made, plain, strict=True):
        for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_parameters_lie_end_to_end_and_stay_what_they_were() -> None:
    made, plain = layers(), layers()
    lay_end_to_end(*made)
    for a, b in zip(made, plain, strict=True):
        assert torch.equal(a.weight, b.weight)
    assert made[1].weight.data_ptr() == made[0].weight.data_ptr() + made[0].weight.numel() * 8
    where = made[0].weight.data_ptr()
    lay_end_to_end(*made)
    assert made[0].weight.data_ptr() == where


def test_a_changed_weight_is_seen_and_a_replaced_one_too() -> None:
    made = layers()
    lay_end_to_end(*made)
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        made[1].weight.mul_(2)
    torch.testing.assert_close(joined_linear(x, *made), apart(x, made))
    made[1].weight = nn.Parameter(torch.randn(4, 12, dtype=torch.float64))
    torch.testing.assert_close(joined_linear(x, *made), apart(x, made))


def test_frozen_and_foreign_layers() -> None:
    made = layers()
    lay_end_to_end(*made)
    made[0].weight.requires_grad_(False)
    x = torch.randn(3, 12, dtype=torch.float64)
    joined_linear(x, *made).sum().backward()
    assert made[0].weight.grad is None
    assert made[1].weight.grad is not None
    foreign = nn.Sequential(nn.Linear(12, 4).double())
    torch.testing.assert_close(joined_linear(x, made[0], foreign), torch.cat([made[0](x), foreign(x)], -1))
