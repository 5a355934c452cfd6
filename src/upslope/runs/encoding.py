"""How numbers are written: JSON that every reader accepts, and little-endian blobs for the token arrays."""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

_SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_TYPECODES = {"int32": "i", "float32": "f", "uint8": "B"}


def as_number(value: Any, name: str) -> int | float:
    """A Python number out of a number, a bool, or a one-element numpy or torch value.

    Raises:
        TypeError: anything else; the message names the metric.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int | float):
        raise TypeError(f"metric {name!r} must be a number, not {type(value).__name__}: {value!r}")
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become the strings "NaN", "Infinity", "-Infinity" (float() reads them back)."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _SPELLED[str(value)]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def pack(values: Any, dtype: str) -> bytes:
    """Numbers (list, numpy array, tensor) -> little-endian blob of "int32", "float32" or "uint8"."""
    items: Iterable[Any] = values.tolist() if hasattr(values, "tolist") else values
    return _ordered(array(_TYPECODES[dtype], items)).tobytes()


def unpack(blob: bytes, dtype: str) -> list[Any]:
    """The inverse of `pack`."""
    packed = array(_TYPECODES[dtype])
    packed.frombytes(blob)
    return _ordered(packed).tolist()


def _ordered(packed: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        packed.byteswap()
    return packed


ENCODINGS = {
    ("little-endian", dtype): (partial(pack, dtype=dtype), partial(unpack, dtype=dtype)) for dtype in _TYPECODES
}
"""(encoding, dtype) of a column of token arrays -> what makes its blobs, and what reads them."""
