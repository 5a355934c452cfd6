"""Gradients of several micro-batches or chunks, added up in float32 on the CPU (sums.cpp)."""

from ctypes import c_int, c_int64, c_void_p

from torch import Tensor

from upslope.kernels import Functions, addresses, kind_of, usable

_lib = Functions(accumulate=[c_int, c_void_p, c_void_p, c_int64])


def accumulate_(total: Tensor, part: Tensor) -> Tensor:
    """Add a tensor to one of the same shape that is at least as wide, in place: total.add_(part), in one pass."""
    fits = usable(total) and usable(part) and total.element_size() == 4 and total.shape == part.shape
    if not fits or not (total.is_contiguous() and part.is_contiguous()):
        return total.add_(part)
    _lib.accumulate(kind_of(part.dtype), *addresses(total, part), total.numel())
    return total
