"""How what a run records is written: strict JSON, little-endian blobs for token arrays, rollouts as rows of both."""

from __future__ import annotations

import json
import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from upslope.types import Prompt, Rollout, RolloutGroup, storable

_SPELLED = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_TYPECODES = {"int32": "i", "float32": "f", "uint8": "B"}


def as_number(value: Any, name: str) -> int | float:
    """A Python number out of a number, a bool, or a one-element numpy or torch value.

    Raises:
        TypeError: anything else; the message names the metric.
    """
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"metric {name!r} must be a number, not {type(value).__name__}: {value!r}")
    return int(value) if isinstance(value, bool) else value


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
    packed = array(_TYPECODES[dtype], values.tolist() if hasattr(values, "tolist") else values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(blob: bytes, dtype: str) -> list[Any]:
    """The inverse of `pack`."""
    packed = array(_TYPECODES[dtype], blob)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


ENCODINGS = {
    ("little-endian", dtype): (partial(pack, dtype=dtype), partial(unpack, dtype=dtype)) for dtype in _TYPECODES
}
"""(encoding, dtype) of a column of token arrays -> what makes its blobs, and what reads them."""


OWN_ARRAYS = ("prompt_tokens", "tokens", "mask", "sampling_logprobs", "policy_logprobs")
"""The columns of token arrays that are a rollout's own fields."""


def rollout_records(
    step: int,
    groups: Sequence[RolloutGroup],
    split: str,
    arrays: Mapping[str, Sequence[Any]],
    advantages: Sequence[float | None] | None,
    wall_time: float,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """(column values in the table's order without the id, array name -> its numbers) for every rollout.

    Raises:
        ValueError: arrays that do not fit the rollouts; the message prints both lengths.
    """
    flat = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    for name, rows in arrays.items():
        if name in OWN_ARRAYS:
            raise ValueError(f"array {name!r} comes from the rollout itself; give the trainer's another name")
        if len(rows) != len(flat):
            raise ValueError(f"array {name!r} has {len(rows)} entries for {len(flat)} rollouts")
    if advantages is not None and len(advantages) != len(flat):
        raise ValueError(f"{len(advantages)} advantages for {len(flat)} rollouts")
    records = []
    for index, (prompt, rollout) in enumerate(flat):
        own = {name: getattr(rollout, name) for name in OWN_ARRAYS}
        for name in ("mask", "sampling_logprobs", "policy_logprobs"):
            if len(own[name]) != len(rollout.tokens):
                raise ValueError(f"a rollout of {len(rollout.tokens)} tokens has {len(own[name])} values in {name!r}")
        extra = {name: _spread(name, rows[index], rollout) for name, rows in arrays.items() if rows[index] is not None}
        advantage = advantages[index] if advantages is not None else _mean(extra.get("advantages"), rollout.mask)
        records.append((_values(step, split, prompt, rollout, _finite(advantage), wall_time), own | extra))
    return records


def _values(
    step: int, split: str, prompt: Prompt, rollout: Rollout, advantage: float | None, wall_time: float
) -> tuple[Any, ...]:
    reward = rollout.reward
    turns = "\n\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return (
        step,
        split,
        prompt.key if -(2**63) <= prompt.key < 2**63 else str(prompt.key),
        rollout.sample,
        rollout.version,
        storable(prompt.text if prompt.text is not None else turns),
        storable(to_json([message.as_mapping() for message in prompt.messages])),
        None if prompt.answer is None else storable(prompt.answer),
        storable(rollout.text),
        _finite(reward.value),
        storable(to_json(reward.parts)),
        None if reward.correct is None else int(reward.correct),
        None if reward.error is None else storable(reward.error),
        to_json(reward.steps),
        reward.seconds,
        rollout.finish_reason,
        advantage,
        len(rollout.tokens),
        wall_time,
    )


def _spread(name: str, values: Any, rollout: Rollout) -> list[float]:
    """One value per token: as given, or from one value per sampled token with NaN at the observed ones."""
    given = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(given) == len(rollout.tokens):
        return given
    if len(given) != (sampled := sum(rollout.mask)):
        raise ValueError(
            f"array {name!r} has {len(given)} values for a rollout of {len(rollout.tokens)} tokens, {sampled} sampled"
        )
    remaining = iter(given)
    return [next(remaining) if is_sampled else math.nan for is_sampled in rollout.mask]


def _mean(values: Sequence[float] | None, mask: Sequence[bool]) -> float | None:
    chosen = [value for value, is_sampled in zip(values or (), mask, strict=values is not None) if is_sampled]
    return math.fsum(chosen) / len(chosen) if chosen else None


def _finite(value: Any) -> float | None:
    number = math.nan if value is None else float(as_number(value, "reward"))
    return number if math.isfinite(number) else None
