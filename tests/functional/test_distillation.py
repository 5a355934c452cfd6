"""The chunked divergence of two heads: equal to the unchunked one, in value and gradient, and never [N, V]."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upslope.functional.distillation import Kind, linear_divergence
from upslope.functional.supervised_losses import divergence

KINDS: list[Kind] = ["forward", "reverse", "jsd"]


def heads(N: int, D: int, E: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return normal(N, D), normal(V, D), normal(N, E), normal(V, E)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_equal_the_unchunked_form(kind: Kind, temperature: float) -> None:
    hidden, weight, teacher, head = heads(41, 6, 9, 37)
    upstream = torch.randn(41, dtype=torch.float64)
    upstream[::4] = 0
    results = []
    for chunk in (None, 1, 7, 16, 100):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunk is None:
            value = divergence(
                F.linear(h, w) / temperature, F.linear(teacher, head) / temperature, kind=kind, weight=0.3
            )
        else:
            value = linear_divergence(h, w, teacher, head, kind=kind, weight=0.3, temperature=temperature, chunk=chunk)
        (value * upstream).sum().backward()
        results.append((value.detach(), h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_numerical_differences(kind: Kind) -> None:
    hidden, weight, teacher, head = heads(5, 3, 4, 6)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return linear_divergence(h, w, teacher, head, kind=kind, temperature=1.3, chunk=2)

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def test_by_hand() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4): both KLs and the JSD at w = 1/2 from their sums."""
    logs = torch.tensor([[1.0], [0.0]])
    student = linear_divergence(torch.zeros(1, 1), logs, torch.full((1, 1), math.log(3)), logs, kind="reverse")
    assert student.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    forward = linear_divergence(torch.zeros(1, 1), logs, torch.full((1, 1), math.log(3)), logs, kind="forward")
    assert forward.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    jsd = linear_divergence(torch.zeros(1, 1), logs, torch.full((1, 1), math.log(3)), logs, kind="jsd")
    middle = (0.625, 0.375)
    of_teacher = 0.75 * math.log(0.75 / middle[0]) + 0.25 * math.log(0.25 / middle[1])
    of_student = 0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
    assert jsd.item() == pytest.approx(0.5 * of_teacher + 0.5 * of_student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    hidden, weight, teacher, head = heads(40, 64, 96, 500, dtype)
    whole = linear_divergence(hidden, weight / 8, teacher, head / 8)
    assert whole.dtype == torch.float32
    for n in (1, 3, 5, 11, 13, 29):
        rows = torch.arange(n)
        part = linear_divergence(hidden[rows], weight / 8, teacher[rows], head / 8, chunk=9)
        assert torch.equal(part, whole[rows])


def test_equal_networks_have_no_divergence_and_the_teacher_no_gradient() -> None:
    hidden, weight, _, _ = heads(6, 4, 4, 9)
    teacher, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    h = hidden.clone().requires_grad_()
    for kind in KINDS:
        value = linear_divergence(h, weight, teacher, head, kind=kind)
        torch.testing.assert_close(value, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
        value.sum().backward()
    assert h.grad is not None
    assert h.grad.abs().max() < 1e-12
    assert teacher.grad is None
    assert head.grad is None


def test_never_holds_all_logits() -> None:
    N, V, chunk = 256, 3001, 16
    hidden, weight, teacher, head = heads(N, 8, 5, V, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return result

    with Watch():
        value = linear_divergence(
            hidden.requires_grad_(), weight.requires_grad_(), teacher, head, kind="jsd", chunk=chunk
        )
        value.sum().backward()
    assert largest == chunk * V


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight_VE": torch.zeros(8, 5)}, "vocabulary"),
        ({"teacher_hidden_NE": torch.zeros(2, 5)}, "rows"),
        ({"weight_VD": torch.zeros(7, 3)}, "student"),
        ({"teacher_weight_VE": torch.zeros(7, 5).bfloat16()}, "teacher.*bfloat16"),
        ({"chunk": 0}, "chunk"),
        ({"temperature": 0.0}, "temperature"),
        ({"kind": "sideways"}, "sideways"),
        ({"kind": "jsd", "weight": 1.0}, "weight"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "hidden_ND": torch.zeros(3, 4),
        "weight_VD": torch.zeros(7, 4),
        "teacher_hidden_NE": torch.zeros(3, 5),
        "teacher_weight_VE": torch.zeros(7, 5),
    }
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**right, **change})  # type: ignore[arg-type]
