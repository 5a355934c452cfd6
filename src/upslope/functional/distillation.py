"""Divergence between two networks' next-token distributions, from their hidden states, a few rows at a time."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_range, check_rank, floats, shape
from .logprobs import _chunks, _head
from .supervised_losses import divergence

Kind = Literal["forward", "reverse", "jsd"]


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_VE: Tensor,
    *,
    kind: Kind = "forward",
    weight: float = 0.5,
    temperature: float = 1.0,
    chunk: int = 256,
) -> Tensor:
    """`divergence` of the logits of two linear heads, each divided by `temperature`: never builds [N, V].

    [N, D], [V, D], [N, E], [V, E] -> [N], at least float32; D and E are the widths of student and teacher.
    Differentiable once in the student's hidden states and weight; the teacher is a constant. Backward computes each
    chunk's logits again, skips rows whose gradient is 0, and accumulates the weight's gradient in float32 (or float64)
    before casting it to the weight's dtype. A row's value does not depend on the rows beside it.

    Sources: GKD (arXiv 2306.13649, eq. 1), MiniLLM (2306.08543). ValueError: shapes do not fit, dtypes of a network's
    states and head differ, chunk < 1, temperature <= 0, unknown kind, weight outside (0, 1).
    """
    check_rank(
        2,
        hidden_ND=hidden_ND,
        weight_VD=weight_VD,
        teacher_hidden_NE=teacher_hidden_NE,
        teacher_weight_VE=teacher_weight_VE,
    )
    for name, hidden, head in (("student", hidden_ND, weight_VD), ("teacher", teacher_hidden_NE, teacher_weight_VE)):
        if hidden.shape[1] != head.shape[1] or hidden.dtype != head.dtype:
            raise ValueError(
                f"the {name}'s states and head must agree in width and dtype: {shape(hidden)} {hidden.dtype}, "
                f"{shape(head)} {head.dtype}"
            )
    if hidden_ND.shape[0] != teacher_hidden_NE.shape[0] or weight_VD.shape[0] != teacher_weight_VE.shape[0]:
        raise ValueError(
            f"student and teacher must agree in rows and vocabulary: {shape(hidden_ND)} and "
            f"{shape(teacher_hidden_NE)} rows, heads {shape(weight_VD)} and {shape(teacher_weight_VE)}"
        )
    check_range(1, chunk=chunk)
    check_range(0.0, open_low=True, temperature=temperature)
    return _LinearDivergence.apply(
        hidden_ND, weight_VD, teacher_hidden_NE.detach(), teacher_weight_VE.detach(), (kind, weight, temperature), chunk
    )


def _rows(student: Tensor, teacher: Tensor, options: tuple[Kind, float, float]) -> Tensor:
    kind, weight, temperature = options
    student, teacher = floats(student, teacher)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    return divergence(student, teacher, kind=kind, weight=weight)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        options: tuple[Kind, float, float],
        chunk: int,
    ) -> Tensor:
        values = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in _chunks(hidden.shape[0], chunk):
            student, teacher = _head(hidden[part], weight), _head(teacher_hidden[part], teacher_weight)
            values[part] = _rows(student, teacher, options).to(values.dtype)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.options, ctx.chunk = options, chunk
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        exact = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needs_weight else None
        index = (grad != 0).nonzero().squeeze(1)
        for part in _chunks(index.shape[0], ctx.chunk):
            rows = index[part]
            h = hidden[rows]
            teacher = _head(teacher_hidden[rows], teacher_weight)
            with torch.enable_grad():
                logits = _head(h, weight).to(exact).requires_grad_()
                value = _rows(logits, teacher, ctx.options)
            (d_logits,) = torch.autograd.grad(value, logits, grad[rows].to(value.dtype))
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                if weight.dtype == exact:
                    d_weight.addmm_(d_logits.t(), h)
                else:
                    d_weight += d_logits.t() @ h
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None
