"""What lm-evaluation-harness measured, as figures with intervals; its own standard errors are not used."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from upslope.evaluation.intervals import Interval, bootstrap, share
from upslope.evaluation.measurement import Figure


def task_figures(name: str, task: Any, results: Mapping[str, Any], seed: int) -> list[Figure]:
    """One figure per metric and filter of a task, from what `lm_eval.evaluator.evaluate` returned with its samples."""
    made = []
    version = results["versions"].get(name)
    for key, value in results["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        rows = [s[metric] for s in results["samples"][name] if s["filter"] == kind and metric in s]
        interval = _interval(rows, float(value), task.aggregation().get(metric), seed)
        better = "lower" if results["higher_is_better"].get(name, {}).get(metric) is False else "higher"
        detail = {"filter": kind, "num_fewshot": results["n-shot"].get(name, 0), "version": version}
        detail["of"] = results["n-samples"][name]["original"]
        made.append(Figure(metric, float(value), interval.low, interval.high, len(rows), name, better, detail))
    return made


def _interval(rows: Sequence[Any], value: float, aggregate: Callable[[Any], float] | None, seed: int) -> Interval:
    """From the documents' own values, by the harness's own way of putting them together."""
    numbers = all(isinstance(x, int | float | np.number) for x in rows)
    if numbers and rows and math.isclose(math.fsum(map(float, rows)) / len(rows), value, rel_tol=1e-9, abs_tol=1e-12):
        return share([float(x) for x in rows], seed)
    if aggregate is None or not rows:
        return Interval(value, math.nan, math.nan)
    return bootstrap(lambda places: float(aggregate([rows[i] for i in places])), len(rows), seed=seed)


def group_figures(results: Mapping[str, Any], figures: Sequence[Figure]) -> list[Figure]:
    """A group's value is a mean of its tasks'; tasks are independent, so their half widths add in quadrature."""
    made = []
    for group in results.get("groups", {}):
        leaves = _leaves(group, results["group_subtasks"])
        for key, value in results["results"][group].items():
            metric, comma, kind = key.partition(",")
            parts = [f for f in figures if f.dataset in leaves and (f.name, f.detail["filter"]) == (metric, kind)]
            if not comma or not parts or not isinstance(value, int | float | np.number):
                continue
            n = sum(f.n for f in parts)
            half = math.nan
            for weights in ([f.n / n for f in parts], [1 / len(parts)] * len(parts)):
                mean = math.fsum(w * f.value for w, f in zip(weights, parts, strict=True))
                if math.isclose(mean, value, rel_tol=1e-9, abs_tol=1e-12):
                    half = math.hypot(*(w * (f.high - f.low) / 2 for w, f in zip(weights, parts, strict=True)))
                    break
            detail = {"filter": kind, "tasks": len(parts), "of": sum(f.detail["of"] for f in parts)}
            made.append(Figure(metric, value, value - half, value + half, n, group, parts[0].better, detail))
    return made


def _leaves(group: str, children: Mapping[str, Sequence[str]]) -> set[str]:
    found = {name for child in children.get(group, ()) for name in _leaves(child, children)}
    return found or {group}
