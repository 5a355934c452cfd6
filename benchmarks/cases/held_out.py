"""The curve of a finished run: what its evaluations measured."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from upslope.runs.store import Store


def held_out_curve(run: Path, metric: str, samples_per_step: int) -> list[tuple[float, float, float]]:
    """(training samples, seconds of training, held-out value) at every evaluation, by step."""
    with closing(Store(run / "run.db", read_only=True)) as store:
        values = {e.step: e.value for e in store.evaluations("held-out") if e.metric == metric}
        seconds = {e.step: e.value for e in store.evaluations("spent") if e.metric == "seconds"}
    return [(float(step * samples_per_step), seconds[step], value) for step, value in values.items()]
