"""Fused kernels for CPUs in plain C++: attention, norms and activations, everything over the vocabulary, AdamW.

They do on a CPU what the torch code beside them does on any device, in fewer passes over memory and, for all of
decoding, scoring and training, in the same order of operations per row: the same bits. Where they cannot be compiled
(`upslope doctor` says why) the torch code runs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from upslope.kernels.build import Unavailable, library

__all__ = ["Functions", "Unavailable", "addresses", "kind_of", "library", "problem", "usable"]

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


class Functions:
    """The library's functions upslope_NAME as attributes, given NAME=their argument types; none returns anything.

    The library is opened, and compiled where need be, when the first of them is asked for.
    """

    def __init__(self, **signatures: Sequence[Any]) -> None:
        self._signatures = signatures

    def __getattr__(self, name: str) -> Any:
        function = getattr(library(), f"upslope_{name}")
        function.argtypes, function.restype = self._signatures[name], None
        setattr(self, name, function)
        return function


def kind_of(dtype: torch.dtype) -> int:
    """The kernels' number of a storage type."""
    return _KINDS[dtype]


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where contiguous tensors lie; None, which is a null pointer, for None."""
    return [None if x is None else x.data_ptr() for x in tensors]
