"""From stored pairs to ratios and a table: everything a report says can be recomputed from the results file.

A pair is one process of ours and one of theirs, run one after the other; each holds "warmup" steps, which are dropped,
and then the measured ones. A speed ratio is theirs / ours in seconds, the memory ratio ours / theirs.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.machine import spread

Result = Mapping[str, Any]
Pair = Mapping[str, Result]

RATIOS = {
    "step_vs_tuned": ("fixed", "seconds"),
    "step_vs_default": ("default", "seconds"),
    "rollout_vs_tuned": ("fixed", "rollout"),
    "update_vs_tuned": ("fixed", "update"),
    "peak_memory_vs_tuned": ("fixed", "peak_memory_gb"),
    "ppo_step_vs_trl_1_12": ("ppo", "seconds"),
    "rollout_vs_vllm": ("vllm", "rollout"),
}
"""Name of a ratio -> the case it is taken from, and what is compared."""


def measured(result: Result, warmup: int) -> list[dict[str, Any]]:
    """The steps after the warm-up."""
    steps = result["steps"][warmup:]
    if not steps:
        raise ValueError(f"a result of {len(result['steps'])} steps has none after {warmup} of warm-up")
    return list(steps)


def value(result: Result, what: str, warmup: int) -> float:
    """Median seconds over the measured steps; of the memory, what the process had reached at their end."""
    values = [step[what] for step in measured(result, warmup)]
    return values[-1] if what == "peak_memory_gb" else statistics.median(values)


def ratio(pair: Pair, what: str, warmup: int) -> float:
    """Theirs / ours in seconds, or ours / theirs in memory."""
    ours, theirs = (value(pair[side], what, warmup) for side in ("ours", "theirs"))
    return ours / theirs if what == "peak_memory_gb" else theirs / ours


def case_ratio(case: Mapping[str, Any] | None, what: str) -> dict[str, float] | None:
    """Median, smallest and largest ratio over the pairs of a stored case; None where there is none."""
    if not case or not case.get("pairs"):
        return None
    found = spread([ratio(pair, what, case["warmup"]) for pair in case["pairs"]])
    return {name: round(x, 3) for name, x in found.items()}


def ratios(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float] | None]:
    """The last line of the benchmark: a case that was not run, or whose peer is missing, is null."""
    return {name: case_ratio(cases.get(case), what) for name, (case, what) in RATIOS.items()}


def lengths(results: Sequence[Result], warmup: int) -> dict[str, float]:
    """Mean and quartiles of the generated lengths in tokens."""
    every = sorted(n for result in results for step in measured(result, warmup) for n in step["lengths"])
    low, middle, high = statistics.quantiles(every, n=4, method="inclusive") if len(every) > 1 else every * 3
    return {"mean": round(statistics.fmean(every), 2), "q1": low, "median": middle, "q3": high}


def tokens_per_second(result: Result, what: str, warmup: int) -> float:
    """Generated tokens over the seconds of the step or of one part."""
    steps = measured(result, warmup)
    return sum(sum(step["lengths"]) for step in steps) / sum(step[what] for step in steps)


def side_lines(case: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is printed and stored of either side of a case: spreads over its pairs."""
    lines = {}
    for side in ("ours", "theirs"):
        results, warmup = [pair[side] for pair in case["pairs"]], case["warmup"]
        lines[side] = {
            what: {k: round(x, 3) for k, x in spread([value(r, what, warmup) for r in results]).items()}
            for what in ("seconds", "rollout", "update", "peak_memory_gb")
        }
        for what, name in (("seconds", "tokens_per_second"), ("rollout", "rollout_tokens_per_second")):
            rates = spread([tokens_per_second(r, what, warmup) for r in results])
            lines[side][name] = {k: round(x, 1) for k, x in rates.items()}
        lines[side]["lengths"] = lengths(results, warmup)
    return lines


def case_report(name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """One line of JSON about a case: who was compared, both sides, every ratio; or why there is no figure."""
    if not case.get("pairs"):
        return {"case": name, "peer": case["peer"], "missing": case.get("missing", "no pair was completed")}
    compared = ("rollout",) if case["kind"] == "rollout" else ("seconds", "rollout", "update", "peak_memory_gb")
    return {
        "case": name,
        "peer": case["peer"],
        "peer_options": case["peer_options"],
        "pairs": len(case["pairs"]),
        "threads": case["threads"],
        "commit": case["machine"]["commit"] + ("+" if case["machine"]["dirty"] else ""),
        **side_lines(case),
        "ratios": {what: case_ratio(case, what) for what in compared},
    }


def table(line: Mapping[str, Any]) -> str:
    """The same for people."""
    if "missing" in line:
        return f"{line['case']} against {line['peer']}: no figure ({line['missing']})"
    rows = [f"{line['case']} against {line['peer']} {line['peer_options']}, {line['pairs']} pairs, {line['commit']}"]
    for side in ("ours", "theirs"):
        numbers = ", ".join(
            f"{what} {line[side][what]['median']:g} [{line[side][what]['min']:g}, {line[side][what]['max']:g}]"
            for what in ("seconds", "rollout", "update", "tokens_per_second", "peak_memory_gb")
        )
        rows.append(f"  {side:<7} {numbers}, lengths {line[side]['lengths']}")
    for what, found in line["ratios"].items():
        rows.append(f"  {what:<15} {found['median']:g}x [{found['min']:g}, {found['max']:g}]")
    return "\n".join(rows)


def best(looks: Sequence[Mapping[str, Any]], *, margin: float = 0.03) -> Mapping[str, Any]:
    """The fastest candidate; among those within `margin` of it the one that needs least memory.

    Raises RuntimeError where none of them ran.
    """
    ran = [look for look in looks if "error" not in look]
    if not ran:
        raise RuntimeError(f"no candidate ran: {'; '.join(look['error'] for look in looks)}")
    fastest = min(look["seconds"] for look in ran)
    near = [look for look in ran if look["seconds"] <= fastest * (1 + margin)]
    return min(near, key=lambda look: look["peak_memory_gb"])
