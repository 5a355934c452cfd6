"""The report of a comparison: one HTML page without scripts, readable offline and by a screen reader.

Its charts are SVG, the same in a report, a README and a printed page.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from upslope.atomic import write_atomic

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A6761D")
"""Okabe and Ito's palette, told apart by colour-blind readers; lines also differ by their dashes."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "\u23ce "}
"""Line breaks and other control characters as pictures: a reply stays a few lines of its cell."""

Point = tuple[float, float]


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Sequence[Point]]],
    *,
    x_label: str,
    y_label: str,
) -> str:
    """One chart as an SVG element: a thin line for every run of a label, a thick one for their median.

    series: label -> runs -> (x, y) points by rising x. The median is taken point by point over runs of equal length;
    with other lengths it ends with the shortest. Points that are not finite are left out. ValueError: nothing to draw.
    """
    clean = {
        label: [[p for p in run if all(map(math.isfinite, p))] for run in runs if run] for label, runs in series.items()
    }
    points = [p for runs in clean.values() for run in runs for p in run]
    if not points:
        raise ValueError(f"chart {title!r}: no finite point to draw")
    width, height = 640, 360
    left, right, top, bottom = 62, 16, 40, 48 + 18 * math.ceil(len(clean) / 3)
    x_ticks, y_ticks = (_ticks([p[i] for p in points]) for i in (0, 1))
    plot_w, plot_h = width - left - right, height - top - bottom

    def place(point: Point) -> str:
        x = left + plot_w * (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        y = top + plot_h * (1 - (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))
        return f"{x:.1f},{y:.1f}"

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor">',
        f"<title>{escape(title)}</title>",
        f'<text x="{left}" y="20" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        y = place((x_ticks[0], tick)).split(",")[1]
        out.append(f'<path d="M{left} {y}H{width - right}" stroke="currentColor" opacity="0.15"/>')
        out.append(f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        x = place((tick, y_ticks[0])).split(",")[0]
        out.append(f'<text x="{x}" y="{height - bottom + 16}" text-anchor="middle">{_short(tick)}</text>')
    out.append(
        f'<text x="{left + plot_w / 2}" y="{height - bottom + 34}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(14 {top + plot_h / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for i, (label, runs) in enumerate(clean.items()):
        colour, dash = COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]
        stroke = f'fill="none" stroke="{colour}"' + (f' stroke-dasharray="{dash}"' if dash else "")
        if len(runs) > 1:
            out += [f'<polyline points="{" ".join(map(place, run))}" {stroke} opacity="0.3"/>' for run in runs]
        columns = zip(*filter(None, runs), strict=False)
        middle = [tuple(statistics.median(p[axis] for p in column) for axis in (0, 1)) for column in columns]
        if len(middle) == 1:
            x, y = place(middle[0]).split(",")
            out.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        out.append(f'<polyline points="{" ".join(map(place, middle))}" {stroke} stroke-width="2.5"/>')
        x, y = left + plot_w * (i % 3) / 3, height - bottom + 52 + 18 * (i // 3)
        out.append(f'<path d="M{x:.0f} {y - 4}h22" {stroke} stroke-width="2.5"/>')
        out.append(f'<text x="{x + 28:.0f}" y="{y}">{escape(label)}</text>')
    return "\n".join([*out, "</svg>"])


def _ticks(values: Sequence[float], wanted: int = 5) -> list[float]:
    """Round numbers that cover the values, about `wanted` of them."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < 1e-30:  # no axis can tell these apart
        half = 0.5 * size if size >= 1e-30 else 0.5
        low, high = low - half, high + half
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if raw <= power * m * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Render what `studies.compare.compare` returns. Replies of models are text and stay text: all is escaped.

    Side by side stand what the start and every recipe (its first seed) answer to the same problems.
    """
    environment = Environment(
        loader=PackageLoader("upslope.studies"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "number": lambda value, digits=3: "–" if value is None else f"{value:,.{digits}f}",  # noqa: RUF001
        "visible": lambda text: text.translate(_PICTURES),
    }
    columns = {"start": result["start"], **{label: next(iter(runs.values())) for label, runs in result["runs"].items()}}
    replies = [
        {"prompt": first["prompt"], "cells": [{"label": label, **run["replies"][i]} for label, run in columns.items()]}
        for i, first in enumerate(result["start"]["replies"])
    ]
    template = environment.get_template("comparison.html")
    write_atomic(path, template.render(result=result, charts=_charts(result), replies=replies))


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
