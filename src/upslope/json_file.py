"""JSON files that others wrote: one object within bounds, or one line that says what is wrong with the file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upslope.atomic import check_plain
from upslope.errors import UpslopeError

LARGEST = 1 << 28  # bytes; the largest tokenizers have some 35 MB
DEEPEST = 64


def read_object(path: Path, error: type[UpslopeError], remedy: str = "get the file again") -> dict[str, Any]:
    """The file's JSON object.

    Raises `error`, naming file and remedy: unreadable, more than LARGEST bytes, not UTF-8, not JSON, a key given twice
    in one object, nested more than DEEPEST deep, not an object.
    """
    try:
        check_plain(path)
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
        _check_depth(value)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}; {remedy}") from problem
    except ValueError as problem:
        raise error(f"{path}: cannot be read as JSON ({problem}); {remedy}") from problem
    except RecursionError as problem:
        raise error(f"{path}: cannot be read as JSON (nested too deeply); {remedy}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: holds no JSON object; {remedy}")
    return value


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        made[key] = value
    return made


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
