"""The report of a comparison: one HTML page without scripts, readable offline and by a screen reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from upslope.atomic import write_atomic
from upslope.studies.charts import line_chart

__all__ = ["write_report"]


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Render what `studies.compare.compare` returns. Replies of models are text and stay text: all is escaped."""
    environment = Environment(
        loader=PackageLoader("upslope.observe"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": _number, "visible": _visible}
    template = environment.get_template("comparison.html")
    write_atomic(path, template.render(result=result, charts=_charts(result), replies=_replies(result)))


def _charts(result: Mapping[str, Any]) -> list[str]:
    """Learning curves over samples and over seconds, and the reliability diagram where there are verdicts."""
    metric = result["start"]["metric"]
    begin = sum(result["start"]["quality"]) / result["n"]
    charts = []
    for axis, words in (("samples", "training samples"), ("seconds", "training seconds")):
        series = {
            label: [[(0.0, begin), *((p[axis], p["value"]) for p in run["curve"])] for run in runs.values()]
            for label, runs in result["runs"].items()
        }
        charts.append(line_chart(f"Held-out {metric} over {words}", series, x_label=words, y_label=metric))
    if result["start"]["calibration"]:
        diagram = {
            label: [[(b["confidence"], b["accuracy"]) for b in run["calibration"]["bins"]] for run in runs.values()]
            for label, runs in result["runs"].items()
        }
        charts.append(
            line_chart(
                "Calibration: share of right replies over the policy's confidence in them",
                {**diagram, "perfect": [[(0.0, 0.0), (1.0, 1.0)]]},
                x_label="probability of the reply",
                y_label="share right",
            )
        )
    return charts


def _replies(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Side by side: what the start and every recipe (its first seed) answer to the same problems."""
    columns = {"start": result["start"], **{label: next(iter(runs.values())) for label, runs in result["runs"].items()}}
    return [
        {"prompt": first["prompt"], "cells": [{"label": label, **run["replies"][i]} for label, run in columns.items()]}
        for i, first in enumerate(result["start"]["replies"])
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"  # noqa: RUF001


def _visible(text: str) -> str:
    """Line breaks and other control characters as pictures: a reply stays a few lines of its cell."""
    return "".join("\u23ce " if c == "\n" else chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)
