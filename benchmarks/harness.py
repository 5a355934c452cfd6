"""What a learning case returns, how its expectation is judged, and how results are written down."""

from __future__ import annotations

import importlib
import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CASES = (
    "enumerable",
    "random_walks",
    "key_door",
    "phonemes",
    "banking77",
    "imitation",
    "preferences",
    "tagging",
    "json_and_sentiment",
    "against_trl",
    "wikitext",
)

Expectation = tuple[str, float] | None
"""("<=" or ">=", bound), or None for what is only reported."""


@dataclass(slots=True)
class Outcome:
    """One run of one learner: its metrics, training samples, seconds, and (samples, seconds, value) along the way."""

    metrics: dict[str, float]
    samples: int
    seconds: float
    curve: list[tuple[float, float, float]] = field(default_factory=list)


class Case(Protocol):
    """A module of benchmarks/cases. A dict SEEDS_OF (learner -> seeds) may give dear learners fewer seeds."""

    NAME: str
    LEARNERS: tuple[str, ...]
    SEEDS: tuple[int, ...]
    EXPECTED: Mapping[str, Mapping[str, Expectation]]

    def run(self, learner: str, seed: int, folder: Path) -> Outcome:
        """Train and measure once; whatever it writes goes into `folder`."""
        ...


def load_case(name: str) -> Case:
    """The module of a case."""
    return importlib.import_module(f"benchmarks.cases.{name}")  # type: ignore[return-value]


def met(value: float, expected: Expectation) -> bool | None:
    """Whether a median fulfils its expectation; None where nothing was expected."""
    if expected is None:
        return None
    op, bound = expected
    return not math.isnan(value) and (value <= bound if op == "<=" else value >= bound)


def lines_of(case: Case, learner: str, outcomes: Mapping[int, Outcome], commit: str) -> list[dict[str, Any]]:
    """One JSON line per metric of a learner: median and range over seeds, and whether it met what was expected."""
    made = []
    expected = case.EXPECTED.get(learner, {})
    names = [*expected, *(n for o in outcomes.values() for n in o.metrics if n not in expected)]
    for name in dict.fromkeys(names):
        values = [o.metrics.get(name, math.nan) for o in outcomes.values()]
        bound = expected.get(name)
        median = statistics.median(values) if not any(map(math.isnan, values)) else math.nan
        made.append(
            {
                "case": case.NAME,
                "learner": learner,
                "metric": name,
                "median": _plain(median),
                "min": _plain(min(values)),
                "max": _plain(max(values)),
                "expected": None if bound is None else f"{bound[0]} {bound[1]:g}",
                "met": met(median, bound),
                "seeds": list(outcomes),
                "samples": int(statistics.median(o.samples for o in outcomes.values())),
                "seconds": round(statistics.median(o.seconds for o in outcomes.values()), 2),
                "commit": commit,
            }
        )
    return made


def _plain(value: float) -> float | None:
    """JSON has no infinity: what was never reached is null."""
    return round(value, 6) if math.isfinite(value) else None


def commit() -> str:
    """The short hash of the code that runs, with a plus sign when files other than results have changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def save(case: Case, learner: str, lines: Sequence[Mapping[str, Any]], curves: Mapping[str, Any]) -> None:
    """Keep a learner's lines and curves in benchmarks/results/learning/CASE.json, beside those of the case's others."""
    folder = RESULTS / "learning"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.NAME}.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"lines": [], "curves": {}}
    found = [line for line in kept["lines"] if line["learner"] != learner] + list(lines)
    order = {name: place for place, name in enumerate(case.LEARNERS)}
    found = sorted((line for line in found if line["learner"] in order), key=lambda line: order[line["learner"]])
    all_curves = {**kept["curves"], learner: {seed: [_short(p) for p in run] for seed, run in curves.items()}}
    ordered = {name: all_curves[name] for name in case.LEARNERS if name in all_curves}
    rows = ",\n".join(f"  {json.dumps(line, allow_nan=False)}" for line in found)
    drawn = ",\n".join(f"  {json.dumps(name)}: {json.dumps(runs, allow_nan=False)}" for name, runs in ordered.items())
    path.write_text(f'{{"lines": [\n{rows}\n ],\n "curves": {{\n{drawn}\n }}\n}}\n')


def _short(point: Sequence[float]) -> list[float]:
    """Five digits of each coordinate: enough for a figure."""
    return [float(f"{x:.5g}") for x in point]
