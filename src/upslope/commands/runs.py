"""`upslope runs`: the runs of a folder and what came out, or one run in full."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from upslope.errors import RunError
from upslope.options import RunsOptions
from upslope.runs.folder import Run


def run(options: RunsOptions) -> int:
    """List or show."""
    folder = Path(options.folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; runs are made under runs/ unless --output-dir says otherwise")
    single = (folder / "config.toml").is_file()
    paths = [folder] if single else sorted(p.parent for p in folder.glob("**/config.toml"))
    rows = [_describe(path) for path in paths]
    if options.json:
        print(json.dumps(rows[0] if single else rows))
    elif not rows:
        print(f"{folder}: no runs in it", file=sys.stderr)
    elif single:
        _show_one(rows[0])
    else:
        _show_many(rows)
    return 0


def _describe(folder: Path) -> dict[str, Any]:
    with Run.open(folder, read_only=True) as opened:
        last = opened.metric_lines()[-1:] or [{}]
        result = opened.result
        return {
            "folder": str(folder),
            "verb": opened.verb,
            "state": "running" if opened.writer() else (result or {}).get("stopped", "stopped without a summary"),
            "steps": last[0].get("step", 0),
            "evaluation": (result or {}).get("evaluation"),
            "last": last[0],
            "config": opened.config,
        }


def _show_many(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "verb", "steps", "held-out", "state")
    for row in rows:
        table.add_row(row["folder"], row["verb"], str(row["steps"]), _held_out(row), row["state"])
    Console().print(table)


def _show_one(row: dict[str, Any]) -> None:
    print(f"{row['folder']}: {row['verb']}, {row['steps']} steps, {row['state']}; held-out: {_held_out(row)}")
    for name, value in sorted(row["last"].items()):
        print(f"  {name:<32} {value:.6g}" if isinstance(value, int | float) else f"  {name:<32} {value}")


def _held_out(row: dict[str, Any]) -> str:
    parts = []
    for name, value in (row["evaluation"] or {}).items():
        shown = (
            f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            if isinstance(value, dict)
            else f"{value:.4g}"
        )
        parts.append(f"{name} {shown}")
    return ", ".join(parts) or "-"
