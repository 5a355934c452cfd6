"""The machine a speed benchmark ran on, and where its results are kept: benchmarks/results/<machine>/<name>.json."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, commit


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(name: str, count: int) -> str:
    """A folder's name for a processor and its number of cores: lower case letters, digits and hyphens."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*$|\bprocessor\b", " ", name.lower())
    return "-".join([*re.findall("[a-z0-9.]+", plain), f"{count}c"])


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor, its cores and memory (1e9 bytes), torch, python, and the code."""
    code = commit()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, OSError, ValueError):
        memory = float("nan")
    return {
        "slug": slug(processor(), cores()),
        "processor": processor(),
        "cores": cores(),
        "memory_gb": round(memory, 1) if memory == memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "torch": version("torch"),
        "python": platform.python_version(),
        "commit": code.rstrip("+"),
        "dirty": code.endswith("+"),
    }


def results_folder() -> Path:
    """benchmarks/results/<slug> of this machine."""
    return RESULTS / slug(processor(), cores())


def save(name: str, data: dict[str, Any]) -> Path:
    """Keep `data` as benchmarks/results/<slug>/<name>.json, replaced as a whole; the file's path."""
    path = results_folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(compact(data))
    fresh.replace(path)
    return path


def compact(data: dict[str, Any]) -> str:
    """JSON with one key a line and every list of plain values on a line of its own; ValueError for NaN or infinity."""
    text = json.dumps(data, indent=1, allow_nan=False)
    plain_list = r"\[\n\s+([^\[\]{}]*?)\n\s+\]"
    return re.sub(plain_list, lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text) + "\n"


def load(name: str) -> dict[str, Any] | None:
    """What `save` kept under this name on a machine like this one, or None."""
    path = results_folder() / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
