"""The figures of several systems side by side: a table on a terminal, one line per figure elsewhere, and JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from upslope.evaluation.measurement import Figure, Measurement


@dataclass(slots=True)
class Results:
    """What was measured of one system; `differences` are to the first system, by (dataset, name)."""

    system: str
    figures: list[Figure] = field(default_factory=list)
    differences: dict[tuple[str, str], Figure] = field(default_factory=dict)


def compared(
    systems: Sequence[str], measured: Sequence[Sequence[Measurement | Figure]], *, seed: int = 0
) -> list[Results]:
    """The figures of each system, and the paired differences of all but the first to the first.

    What comes as a Figure has no items to pair, so it has no difference.
    """
    found: list[Results] = []
    first = {(m.dataset, m.name): m for m in measured[0] if isinstance(m, Measurement)}
    for system, own in zip(systems, measured, strict=True):
        results = Results(system, [m if isinstance(m, Figure) else m.figure(seed=seed) for m in own])
        for m in own if found else ():
            base = first.get((m.dataset, m.name))
            difference = m.difference(base, seed=seed) if isinstance(m, Measurement) and base is not None else None
            if difference is not None:
                results.differences[m.dataset, m.name] = difference
        found.append(results)
    return found


def as_json(results: Sequence[Results]) -> dict[str, Any]:
    """{"systems": [{"system", "figures": [...], "differences": [...]}]}; a difference says from which system."""
    base = results[0].system
    return {
        "systems": [
            {
                "system": r.system,
                "figures": [figure.as_json() for figure in r.figures],
                "differences": [{**d.as_json(), "minus": base} for d in r.differences.values()],
            }
            for r in results
        ]
    }


def write(results: Sequence[Results], stream: TextIO) -> None:
    """Show the results on `stream`, with the notes that make each figure repeatable."""
    if stream.isatty():
        _write_table(results, stream)
    else:
        for r, figure in ((each, figure) for each in results for figure in each.figures):
            line = f"{r.system}  {figure.dataset}  {figure.name} {_shown(figure)} n={_counted(figure)}"
            if difference := r.differences.get((figure.dataset, figure.name)):
                line += f"  difference to {results[0].system} {_shown(difference, True)}"
            print(line, file=stream)
    for note in dict.fromkeys(note for r in results for figure in r.figures for note in _notes(figure)):
        print(note, file=stream)


def _write_table(results: Sequence[Results], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("measured on", "figure", "n")
    for r in results:
        table.add_column(Text(r.system))
    rows: dict[tuple[str, str], dict[int, Figure]] = {}
    for i, r in enumerate(results):
        for figure in r.figures:
            rows.setdefault((figure.dataset, figure.name), {})[i] = figure
    for (dataset, name), row in rows.items():
        cells = ["-"] * len(results)
        for i, figure in row.items():
            difference = results[i].differences.get((dataset, name))
            cells[i] = _shown(figure) + (f"\n{_shown(difference, True)}" if difference else "")
        arrow = "↓" if figure.better == "lower" else "↑"
        counts = dict.fromkeys(map(_counted, row.values()))
        table.add_row(Text(dataset), Text(f"{name} {arrow}"), "\n".join(counts), *map(Text, cells))
    Console(file=stream).print(table)
    if len(results) > 1:
        print(f"signed: difference to {results[0].system}, paired 95% interval", file=stream)


def _shown(figure: Figure, signed: bool = False) -> str:
    digits = 2 if figure.detail.get("scale") == 100 or max(abs(figure.value), abs(figure.high)) >= 10 else 4

    def number(x: float) -> str:
        if not math.isfinite(x):
            return "infinite" if x > 0 else str(x)
        return f"{x:+.{digits}f}" if signed else f"{x:.{digits}f}" if abs(x) < 1e6 else f"{x:.3e}"

    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def _counted(figure: Figure) -> str:
    """n, and of how many where it is a part of what was named."""
    return _part(figure.n, figure.detail.get("of", figure.n))


def _part(n: int, of: int) -> str:
    return str(n) if of == n else f"{n} of {of}"


_COUNTED = (
    ("errors", "{errors} could not be judged, the first: {first_error}"),
    ("cut", "{cut} of {completions} completions were cut at the longest length"),
    ("truncated", "{truncated} contexts were cut from the left to fit the model"),
    ("cut_contexts", "{cut_contexts} contexts were cut from the left to fit the model"),
    ("broken_rows", "{broken_rows} rows are broken and left out"),
    (
        "divided",
        "only the {of} of the file's {divided} different rows that are held out by content (eval_fraction) are "
        "measured",
    ),
)
"""What is said of a dataset where the count of this name is not 0."""


def _notes(figure: Figure) -> Iterator[str]:
    detail = figure.detail
    if "signature" in detail:
        yield f"{figure.name}: {detail['signature']}"
    if "form" in detail:
        yield (
            f"{figure.dataset}: {_part(detail['documents'], detail['available'])} documents ({detail['form']}): "
            f"{detail['tokens']} tokens, "
            f"{detail['words']} words, {detail['bytes']} bytes, in windows of {detail['context']}, "
            f"stride {detail['stride']}"
        )
    yield from (f"{figure.dataset}: {said.format(**detail)}" for name, said in _COUNTED if detail.get(name))
    if figure.name == "reward_accuracy":
        yield f"{figure.dataset}: {detail['ties']} ties, which count half"
    if figure.name == "win_rate":
        # what a judge said of the rows, and which verdicts are missing: each row is asked about twice
        yield (
            f"{figure.dataset}: {detail['wins']} wins, {detail['ties']} ties, {detail['losses']} losses by "
            f"{detail['judge']}; {detail['inconsistent']} rows by position alone; {detail['not_judged']} rows not "
            f"judged: {detail['unparsable']} verdicts unparsable, {detail['failed']} lost"
        )
        for kind, word in (("unparsable", "unparsable"), ("failed", "lost")):
            if detail[kind]:
                yield f"{figure.dataset}: the first {word} verdict: {detail[f'first_{kind}']}"
    if detail.get("tuned_on"):
        yield f"{figure.dataset}: score_weight {detail['score_weight']} was chosen on {detail['tuned_on']} other lists"
