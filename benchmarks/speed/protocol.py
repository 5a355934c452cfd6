"""How a worker is asked and answers: `python -m benchmarks.speed.WORKER settings.json result.json`. Plain Python.

A worker makes settings["warmup"] + settings["steps"] steps in its own process and reports each: its seconds (from the
end of the step before it, so everything between two steps counts), those of its rollout (until the completions exist)
and of its reward, the prompt tokens, the length of every completion, and the process's peak memory so far.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def settings() -> dict[str, Any]:
    """What this worker was asked."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


def answer(steps: Steps, packages: list[str], **facts: Any) -> None:
    """Write the result: the steps and the versions of what did the work."""
    versions = {package: version(package) for package in packages}
    result = {"steps": steps.made, "versions": versions, **facts}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in gigabytes (1e9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Steps:
    """Collects what is reported of every step."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self._parts: dict[str, float] = {}
        self._facts: dict[str, Any] = {}
        self._last = time.perf_counter()

    def begin(self) -> None:
        """The first step begins now."""
        self._last = time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        """So many seconds of the present step went into "rollout" or "reward"."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its seconds counted as `part`."""

        def inner(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.add(part, time.perf_counter() - began)

        return inner

    def note(self, *, prompt_tokens: int, lengths: list[int]) -> None:
        """Prompt tokens of all samples together (each sample counts its prompt), and the completions' lengths."""
        self._facts = {"prompt_tokens": prompt_tokens, "lengths": lengths}

    def end(self) -> None:
        """The present step ends now."""
        now = time.perf_counter()
        parts = {"rollout": 0.0, "reward": 0.0, **self._parts}
        whole = now - self._last
        self.made.append(
            {
                "seconds": round(whole, 4),
                "rollout": round(parts["rollout"], 4),
                "reward": round(parts["reward"], 4),
                "update": round(whole - parts["rollout"] - parts["reward"], 4),
                "peak_memory_gb": round(peak_memory_gb(), 4),
                **self._facts,
            }
        )
        self._parts, self._last = {}, now
