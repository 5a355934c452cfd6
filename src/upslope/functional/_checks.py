"""Argument checks shared by the package: every message prints the shapes or the values that are wrong."""

import math
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor


def floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one floating dtype, at least float32: integers and half precisions are promoted."""
    dtypes = [x.dtype if x.is_floating_point() else torch.get_default_dtype() for x in tensors]
    for x in tensors:
        if x.is_complex():
            raise ValueError(f"complex values are not supported: dtype {x.dtype}, shape {shape(x)}")
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    return tuple(x.to(dtype) for x in tensors)


def shape(x: Tensor) -> list[int]:
    """The shape as a plain list, for messages."""
    return list(x.shape)


def check_rank(rank: int, **tensors: Tensor) -> None:
    """ValueError unless every tensor has this many dimensions."""
    for name, x in tensors.items():
        if x.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimension(s), got shape {shape(x)}")


def check_same_shape(**tensors: Tensor) -> None:
    """ValueError unless all shapes are equal."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        raise ValueError("shapes must be equal: " + ", ".join(f"{k} {shape(x)}" for k, x in tensors.items()))


def alike(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one floating dtype, after `check_same_shape`."""
    check_same_shape(**tensors)
    return floats(*tensors.values())


def check_broadcast(**tensors: Tensor) -> None:
    """ValueError unless the shapes broadcast with the same number of dimensions (scalars go with anything).

    A [B] beside a [B, T] is refused: torch would align it with T, which is wrong even where it happens to fit.
    """
    ranks = {x.dim() for x in tensors.values() if x.dim() > 0}
    shapes = [x.shape for x in tensors.values()]
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        ranks = {-1, -2}
    if len(ranks) > 1:
        raise ValueError(
            "shapes must be equal, or broadcast with the same number of dimensions: "
            + ", ".join(f"{k} {shape(x)}" for k, x in tensors.items())
        )


def check_range(
    low: float = -math.inf, high: float = math.inf, /, *, open_low: bool = False, **values: float | None
) -> None:
    """ValueError unless low <= value <= high (low < value with open_low) for each that is not None; NaN is refused."""
    for name, value in values.items():
        if value is not None and (not (low <= value <= high) or (open_low and value == low)):
            bracket = "(" if open_low else "["
            raise ValueError(f"{name} must lie in {bracket}{low:g}, {high:g}], got {value}")


def as_mask(mask: Tensor, **like: Tensor) -> Tensor:
    """The mask as booleans, after checking that it has the shape of every named tensor and holds only 0 and 1."""
    check_same_shape(**like, mask=mask)
    if mask.dtype == torch.bool:
        return mask
    selected = mask != 0
    if not bool(((mask == 1) | ~selected).all()):
        raise ValueError(f"mask must hold only 0 and 1, got values from {mask.min()} to {mask.max()}")
    return selected


def select(mask: Tensor, x: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere: also stops NaN and infinity there, forwards and backwards."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def split_finite(*tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(ok, tensors) with every position at which any input is not finite replaced by 0 in all of them.

    An element-wise loss has no mask, and its caller selects afterwards. Without this, an unused NaN would still reach
    the gradient, because backward multiplies the zero it gets by the NaN. See `nan_unless`.
    """
    ok = reduce(torch.logical_and, [x.detach().isfinite() for x in tensors])
    return ok, tuple(select(ok, x) for x in tensors)


def aligned(**tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`split_finite` of the tensors in one dtype, after `check_broadcast`."""
    check_broadcast(**tensors)
    return split_finite(*floats(*tensors.values()))


def nan_unless(ok: Tensor, x: Tensor) -> Tensor:
    """x where ok, NaN elsewhere: a NaN that was not masked stays visible in the loss, and its gradient is 0."""
    return torch.where(ok, x, torch.full((), math.nan, dtype=x.dtype, device=x.device))


def safe_exp(x: Tensor) -> Tensor:
    """exp(x); where it overflows the value is inf and the gradient 0, not 0 * inf."""
    return _guarded(torch.exp, x)


def safe_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 with all its digits near 0, guarded like `safe_exp`."""
    return _guarded(torch.expm1, x)


def _guarded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = function(x.detach())
    ok = value.isfinite()
    return torch.where(ok, function(select(ok, x)), value)


def clean_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(ok [...], logits [..., V]) with the rows that hold a NaN set to 0, so that they cannot reach the gradient."""
    ok = ~logits.detach().amax(-1).isnan()
    return ok, logits if bool(ok.all()) else select(ok.unsqueeze(-1), logits)
