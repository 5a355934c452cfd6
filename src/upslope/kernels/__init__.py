"""Fused kernels for CPUs in plain C++: attention, norms and activations, everything over the vocabulary, AdamW.

They do on a CPU what the torch code beside them does on any device, in fewer passes over memory and, for all of
decoding, scoring and training, in the same order of operations per row: the same bits. Where they cannot be compiled
(`upslope doctor` says why) the torch code runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from upslope.kernels.build import Unavailable, library

__all__ = ["Unavailable", "functions", "kind_of", "library", "pointer", "problem", "usable"]

_KINDS = {torch.float32: 0, torch.bfloat16: 1}


@cache
def problem() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, all of one dtype, float32 or bfloat16."""
    first = tensors[0]
    if first.dtype not in _KINDS or problem() is not None:
        return False
    return all(x.dtype == first.dtype and x.device.type == "cpu" for x in tensors)


def functions(signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    """The library, with the argument types of its functions upslope_NAME declared; none returns anything."""
    lib = library()
    for name, arguments in signatures.items():
        function = getattr(lib, f"upslope_{name}")
        function.argtypes, function.restype = arguments, None
    return lib


def kind_of(dtype: torch.dtype) -> int:
    """The kernels' number of a storage type."""
    return _KINDS[dtype]


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    """The address of a contiguous tensor; null for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())
