"""Turn benchmarks/results/learning/*.json into docs/learning.md and its figures.

python benchmarks/learning_report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.harness import CASES, RESULTS, ROOT, load_case
from upslope.evaluation.measurement import wilson
from upslope.studies.report import line_chart

PAGE = ROOT / "docs" / "learning.md"
FIGURES = ROOT / "docs" / "figures"
HEAD = """# Evidence that it learns

Written by `python benchmarks/learning_report.py` out of `benchmarks/results/learning/`, which
`python benchmarks/learning.py --json` made. Medians over the seeds, with the range in brackets; every run goes through
the recipes that users run. What is expected was written into `benchmarks/cases/` before the run that judges it; what
missed its expectation is shown as it came out. "never" stands for a value that was not reached.
"""


def main() -> int:
    """Write the page and the figures."""
    parts, missed = [HEAD], []
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        path = RESULTS / "learning" / f"{name}.json"
        if not path.is_file():
            parts.append(f"## {name}\n\nNot run yet: `python benchmarks/learning.py --case {name}`.\n")
            continue
        found = json.loads(path.read_text())
        parts.append(_section(name, found))
        missed += [line for line in found["lines"] if line["met"] is False]
    parts.insert(1, _verdict(missed))
    PAGE.write_text("\n".join(parts))
    print(f"{PAGE.relative_to(ROOT)}: {len(missed)} expectations missed", file=sys.stderr)
    return 0


def _verdict(missed: Sequence[Mapping[str, Any]]) -> str:
    if not missed:
        return "Every expectation was met.\n"
    rows = [
        f"- {m['case']}, {m['learner']}: {m['metric']} {_number(m['median'])}, expected {m['expected']}" for m in missed
    ]
    return "Not met:\n\n" + "\n".join(rows) + "\n"


def _section(name: str, found: Mapping[str, Any]) -> str:
    doc = load_case(name).__doc__ or ""
    lines = found["lines"]
    text = [f"## {name}", "", doc.strip(), ""]
    figures = _figures(name, found["curves"])
    text += [f"![{name} over {axis}](figures/{file})" for axis, file in figures]
    text += ["", "| learner | metric | median [range] | expected | met | samples | seconds |"]
    text += ["|---|---|---|---|---|---|---|"]
    rows = getattr(load_case(name), "TEST_ROWS", None)
    for line in lines:
        spread = f"{_number(line['median'])} [{_number(line['min'])}, {_number(line['max'])}]"
        if rows and line["metric"].startswith("test_accuracy"):
            _, low, high = wilson(round(line["median"] * rows), rows)
            spread += f"; 95% {low:.3f} to {high:.3f}"
        verdict = {True: "yes", False: "**no**", None: ""}[line["met"]]
        text.append(
            f"| {line['learner']} | {line['metric']} | {spread} | {line['expected'] or ''} | {verdict} | "
            f"{line['samples']:,} | {line['seconds']:g} |"
        )
    made: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        learners = made.setdefault((", ".join(map(str, line["seeds"])), line["commit"]), [])
        if line["learner"] not in learners:
            learners.append(line["learner"])
    for (seeds, at), learners in made.items():
        whose = "" if len(made) == 1 else f"{', '.join(learners)}: "
        text += ["", f"*{whose}Seeds {seeds}; commit {at}.*"]
    text.append("")
    return "\n".join(text)


def _figures(name: str, curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> list[tuple[str, str]]:
    drawn = {learner: [run for run in runs.values() if run] for learner, runs in curves.items()}
    drawn = {learner: runs for learner, runs in drawn.items() if runs}
    if not drawn:
        return []
    made = []
    for place, axis in enumerate(("samples", "seconds")):
        series = {learner: [[(p[place], p[2]) for p in run] for run in runs] for learner, runs in drawn.items()}
        file = f"learning_{name}_{axis}.svg"
        chart = line_chart(name.replace("_", " "), series, x_label=f"training {axis}", y_label="held-out value")
        (FIGURES / file).write_text(chart.replace('fill="currentColor">', 'fill="#777" color="#777">', 1) + "\n")
        made.append((axis, file))
    return made


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
