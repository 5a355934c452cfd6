"""metrics.jsonl: one JSON object per line, appended whole, so that any tool can follow it."""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from upslope.atomic import open_own, refuse_other_than_file, saving, write_atomic
from upslope.errors import RunError
from upslope.runs.encoding import to_json


class MetricLines:
    """Appends to the file; a last line torn by a kill is repaired on construction.

    Raises:
        RunError: unwritable file, a link or a pipe, full disk (the file is cut back to its last whole line).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        refuse_other_than_file(path)
        with saving(path):
            _repair(path)
            self._reopen()

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; on failure nothing of it stays."""
        data = memoryview((to_json(record) + "\n").encode())
        with saving(self.path):
            size = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def keep_until(self, step: int, *, evaluated: bool = True) -> None:
        """Drops every line of a later step, atomically; the lines that stay are kept byte for byte.

        evaluated: whether the line of an evaluation at `step` itself stays.
        """

        def write(file: IO[bytes]) -> None:
            for number, (line, record) in enumerate(_lines(self.path), start=1):
                if not isinstance(record.get("step"), int):
                    raise RunError(f"{self.path}:{number}: a metrics line without an integer step; delete that line")
                if record["step"] < step + (evaluated or not is_evaluation(record)):
                    file.write(line)

        write_atomic(self.path, write)
        with saving(self.path):
            self._reopen()

    def flush(self) -> None:
        """Makes what was appended durable."""
        with saving(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _reopen(self) -> None:
        self.close()
        self._descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND)


def evaluation_keys(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out metrics under their names in a line: eval/reward, and of an interval eval/reward/low, high and n."""
    named: dict[str, Any] = {}
    for name, given in metrics.items():
        key = f"eval/{name.removeprefix('eval_')}"
        if isinstance(given, Mapping):
            named[key] = given["value"]
            named |= {f"{key}/{part}": given[part] for part in ("low", "high", "n") if part in given}
        else:
            named[key] = given
    return named


def in_words(metrics: Mapping[str, Any]) -> str:
    """Evaluated numbers in one line, intervals in brackets."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            lost = f", {value['errors']} not judged" if value.get("errors") else ""
            parts.append(f"{name} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}] n={value['n']}{lost}")
        elif name != "eval_rows":  # the n of the interval beside it
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record of the file is that of an evaluation, not of a step."""
    return any(name.startswith("eval/") for name in record)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, also while it is being written: an unfinished last line is left out."""
    return (record for _, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with saving(path, "read"), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line)
            if record is None:
                raise RunError(f"{path}:{number}: not a JSON object; delete that line")
            yield line, record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _repair(path: Path) -> None:
    """Completes a last line that lacks only its newline, and cuts off one that lacks more."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if tail and _parse(tail) is None:
            file.truncate(start)
        elif tail:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
