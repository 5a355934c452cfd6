"""Charts are well-formed SVG and put the points where they belong."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.studies.report import _ticks, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(chart)
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # type: ignore[misc]
        for line in root.iter(f"{SVG}polyline")
        if line.attrib["points"]
    ]


def test_a_straight_line_goes_from_corner_to_corner() -> None:
    (line,) = points_of(line_chart("t", {"a": [[(0, 0), (5, 5), (10, 10)]]}, x_label="x", y_label="y"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x0 == 62.0
    assert x2 == 624.0
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2, "larger values are higher up"


def test_several_runs_are_thin_and_their_median_thick() -> None:
    chart = line_chart("t", {"a": [[(0, 0), (1, 1)], [(0, 0), (1, 3)], [(0, 0), (1, 2)]]}, x_label="x", y_label="y")
    root = ElementTree.fromstring(chart)
    widths = [line.attrib.get("stroke-width") for line in root.iter(f"{SVG}polyline")]
    assert widths == [None, None, None, "2.5"]
    assert points_of(chart)[3] == points_of(chart)[2]


def test_median_ends_with_the_shortest_run() -> None:
    runs = [[(0, 1), (1, 2)], [(0, 3)], [(0, 8), (1, 9)]]
    drawn = points_of(line_chart("t", {"a": runs}, x_label="x", y_label="y"))
    assert drawn[3] == drawn[1]
    assert len(drawn[3]) == 1


def test_text_is_escaped_and_named_for_screen_readers() -> None:
    chart = line_chart("<b>&", {"<script>alert(1)</script>": [[(0, 1), (1, 2)]]}, x_label="<x>", y_label='"y"')
    assert "<script>" not in chart
    root = ElementTree.fromstring(chart)
    assert root.attrib["aria-label"] == "<b>&"
    assert root.attrib["role"] == "img"


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(ValueError, match="no finite point"):
        line_chart("t", {"a": [[(0, math.nan)]], "b": []}, x_label="x", y_label="y")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_ticks_cover_the_values_and_are_few(values: list[float]) -> None:
    ticks = _ticks(values)
    size = (ticks[-1] - ticks[0]) or 1
    assert ticks[0] <= min(values) + 1e-6 * size
    assert ticks[-1] >= max(values) - 1e-6 * size
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.lists(st.lists(st.tuples(st.floats(), st.floats(-1e6, 1e6)), max_size=4), max_size=3),
        max_size=9,
    )
)
def test_any_series_is_well_formed_or_refused(series: dict) -> None:
    named = {re.sub(r"[^\x20-\ud7ff]", "", key): runs for key, runs in series.items()}
    bounded = {
        key: [[(x, y) for x, y in run if not math.isfinite(x) or abs(x) < 1e12] for run in runs]
        for key, runs in named.items()
    }
    if not any(math.isfinite(x) and math.isfinite(y) for runs in bounded.values() for run in runs for x, y in run):
        with pytest.raises(ValueError, match="no finite point"):
            line_chart("t", bounded, x_label="x", y_label="y")
        return
    chart = line_chart("t", bounded, x_label="x", y_label="y")
    ElementTree.fromstring(chart)
    assert "nan" not in chart
