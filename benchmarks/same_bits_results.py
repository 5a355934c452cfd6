"""What runs have left, read and compared bit for bit: the half of benchmarks/same_bits.py that starts nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sqlite3
import struct
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IGNORED = re.compile(r"(^|/)(log|\.lock|env\.json|[^/]*\.toml|manifest\.json|run\.db-\w+|cache/.*)$")
TIMES = re.compile(
    r"(^|[ /_.])(time|seconds|clock|tokens_per_second|peak_memory_gb|reward_seconds|commands)($|[/.\[ ])"
)
"""Names that tell a time, a speed or memory, or how to call the next command."""
WORKPLACE = re.compile(r"[^\s'\"]*/\.runs-\w+/[ab]/")
"""Where a run was made: in texts only what follows it counts."""
KEYS = {"metrics": 2, "evaluations": 3, "token_arrays": 2, "meta": 1}
"""Tables of run.db whose rows are told apart by their first columns; others by their order."""
ARRAYS = {"prompt_tokens": "I32", "tokens": "I32", "mask": "U8"}
"""How run.db packs the arrays that are not float32."""
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B", "BOOL": "?"}


@dataclass(frozen=True)
class Array:
    """Numbers as they lie in a file, little-endian; dtype in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __getitem__(self, index: int) -> Any:
        size = max(1, len(self.data) // max(1, math.prod(self.shape)))
        item = self.data[index * size : (index + 1) * size]
        if self.dtype == "BF16":
            return struct.unpack("<f", b"\0\0" + item)[0]
        return struct.unpack(f"<{FORMATS[self.dtype]}", item)[0] if self.dtype in FORMATS else item.hex()

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Found = dict[str, Any]
"""What runs left: "FILE: NAME" -> an Array, or a value of JSON or SQLite."""


# Reading


def read_case(folder: Path) -> Found:
    """Everything comparable under a folder; links are what they point to."""
    found: Found = {}
    for path in sorted(folder.rglob("*")):
        file = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[f"{file}: link"] = os.readlink(path)
        elif path.is_file() and not IGNORED.search(file):
            for name, value in _read(path):
                if not TIMES.search(name):
                    plain = WORKPLACE.sub("", value) if isinstance(value, str) else value
                    found[_unused(f"{file}: {name}", found)] = plain
    return found


def renamed(found: Found, names: Iterable[tuple[str, str]]) -> Found:
    """The same under today's and tomorrow's names alike; what has no name left is not compared."""
    for pattern, replacement in names:
        before, found = found, {}
        for name, value in before.items():
            if plain := re.sub(pattern, replacement, name):
                found[_unused(plain, found)] = value
    return found


def _unused(name: str, found: Found) -> str:
    """`name`, or the first of name #2, name #3 ... that nothing has yet: what is written twice is compared twice."""
    number = 1
    while (free := name if number == 1 else f"{name} #{number}") in found:
        number += 1
    return free


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".safetensors":
        yield from _tensors(path)
    elif path.suffix == ".db":
        yield from _rows(path)
    elif path.name == "metrics.jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            step = record.pop("step")
            yield from ((f"step {step}: {name}", value) for name, value in record.items())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from _leaves(json.loads(line), f"line {number}")
    elif path.suffix == ".json":
        yield from _leaves(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".toml":
        yield from _leaves(tomllib.loads(path.read_text(encoding="utf-8")))
    else:
        yield "bytes", hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, Array]]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            low, high = entry["data_offsets"]
            yield name, Array(entry["dtype"], tuple(entry["shape"]), data[start + low : start + high])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value:
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}[{place}]")
    else:
        yield name, value


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"):
            cursor = connection.execute(f'SELECT * FROM "{table}"')
            columns, keys = [column[0] for column in cursor.description], KEYS.get(table, 0)
            for number, row in enumerate(cursor):
                key = " ".join(map(str, row[:keys])) if keys else f"row {number}"
                for column, value in zip(columns[keys:], row[keys:], strict=True):
                    if isinstance(value, bytes):
                        dtype = ARRAYS.get(str(row[keys - 1]), "F32")
                        value = Array(dtype, (len(value) // struct.calcsize(FORMATS[dtype]),), value)
                    yield f"{table} {key} {column}", value
    finally:
        connection.close()


# Comparing


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: its first differing values, and how many values of how many differ."""

    name: str
    first: str
    second: str
    count: int = 1
    size: int = 1

    def __str__(self) -> str:
        many = f" ({self.count} of {self.size} values differ)" if self.size > 1 else ""
        return f"{self.name}: {self.first} | {self.second}{many}"


ABSENT = "(absent)"


def differences(one: Found, two: Found) -> list[Difference]:
    """What is not the same in both, in the order of the files, metrics first."""
    names = sorted({**one, **two}, key=lambda name: ("metrics.jsonl" not in name, "run.db" not in name))
    pairs = ((name, one.get(name, ABSENT), two.get(name, ABSENT)) for name in names)
    return [found for name, a, b in pairs if (found := _difference(name, a, b))]


def _difference(name: str, a: Any, b: Any) -> Difference | None:
    if a == b and repr(a) == repr(b):
        return None
    if isinstance(a, Array) and isinstance(b, Array) and (a.dtype, a.shape) == (b.dtype, b.shape):
        size = math.prod(a.shape)
        width = len(a.data) // size
        spots = [i for i in range(size) if a.data[i * width : (i + 1) * width] != b.data[i * width : (i + 1) * width]]
        first, second = _shown(a[spots[0]]), _shown(b[spots[0]])
        if first == second:  # NaN of different bits
            first, second = (x.data[spots[0] * width :][:width].hex() for x in (a, b))
        return Difference(f"{name}[{spots[0]}]", first, second, len(spots), size)
    return Difference(name, _shown(a), _shown(b))


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Array) or value is ABSENT else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def counted(found: Found) -> Counter[str]:
    """How much there is to compare, by kind."""
    kinds: Counter[str] = Counter()
    for name, value in found.items():
        file, _, item = name.partition(": ")
        if file.endswith(".safetensors"):
            kinds["tensors"] += 1
            kinds["tensor values"] += math.prod(value.shape)
        elif file.endswith("metrics.jsonl"):
            kinds["metrics"] += 1
        elif file.endswith(".db"):
            kinds["rollouts"] += item.startswith("rollouts ") and item.endswith(" completion")
            kinds["token arrays" if isinstance(value, Array) else "cells of run.db"] += 1
        else:
            kinds["other values"] += 1
    return kinds
