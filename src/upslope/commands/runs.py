"""`upslope runs`: the runs of a folder and what came out, or one run in full; `upslope explain`: what one would do."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upslope.config import load
from upslope.errors import ConfigError, RunError, UpslopeError
from upslope.options import DemoOptions, ExplainOptions, RunsOptions
from upslope.preview.plan import plan_of
from upslope.recipes import CLASSES
from upslope.runs.folder import HELD_OUT, Run
from upslope.runs.lines import in_words


def run(options: RunsOptions) -> int:
    """List or show."""
    folder = Path(options.folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; runs are made under runs/ unless --output-dir says otherwise")
    single = (folder / "config.toml").is_file()
    rows = [_row(folder)] if single else list(_found(folder))
    if options.json:
        print(json.dumps(rows[0] if single else rows))
    elif not rows:
        print(f"{folder}: no runs in it", file=sys.stderr)
    elif single:
        _show_one(rows[0])
    else:
        _show_many(rows)
    return 0


def _found(root: Path) -> Iterator[dict[str, Any]]:
    """A row for every run under the folder, and for whatever cannot be looked into."""
    closed: list[OSError] = []
    for folder, inside, files in os.walk(root, onerror=closed.append):
        inside.sort()
        if "config.toml" in files:
            inside[:] = [name for name in inside if name != "checkpoints"]
            try:
                yield _row(Path(folder))
            except (UpslopeError, OSError, ValueError) as error:
                yield _damaged(folder, str(error))
    for error in closed:
        yield _damaged(str(error.filename), f"cannot be read: {error.strerror}")


def _damaged(folder: str, said: str) -> dict[str, Any]:
    return {"folder": folder, "error": " ".join(said.removeprefix(f"{folder}/").split())}


def _row(folder: Path) -> dict[str, Any]:
    """What there is to show of a run. Errors: RunError where its files cannot be shown."""
    try:
        row = _describe(folder)
        _cells(row), in_words(row["evaluation"] or {})
        return row
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        raise RunError(f"{folder}/: env.json, summary.json or run.db holds what no run writes ({error!r})") from error


def _describe(folder: Path) -> dict[str, Any]:
    with Run.open(folder, read_only=True) as opened:
        last = opened.metric_lines()[-1:] or [{}]
        result = opened.result or {}
        looked = [each.step for each in opened.store.evaluations(HELD_OUT)]
        launches = [*opened.environment.get("earlier", []), opened.environment]
        return {
            "folder": str(folder),
            "verb": opened.verb,
            "started": launches[0].get("time"),
            "state": "running" if opened.writer() else result.get("stopped", "unfinished"),
            "steps": last[0].get("step", 0),
            "measure": opened.measure,
            "best": result.get("best"),
            "evaluation": result.get("evaluation") or (opened.evaluated(max(looked)) if looked else None),
            "last": last[0],
            "config": opened.config,
        }


def _show_many(rows: list[dict[str, Any]]) -> None:
    """Columns; where a terminal is too narrow, a run's name in full, and the rest of its row on the next line."""
    cells = [_cells(row) for row in rows if "error" not in row]
    widths = [max(map(len, column)) for column in zip(("run", *[""] * 5), *cells, strict=True)]
    narrow = sys.stdout.isatty() and sum(widths) + 2 * len(widths) > shutil.get_terminal_size().columns
    for row in rows:
        if "error" in row:
            print(f"{row['folder']}  {row['error']}")
            continue
        name, *rest = (cell.ljust(width) for cell, width in zip(_cells(row), widths, strict=True))
        print(f"{name.rstrip()}\n   {'  '.join(rest)}".rstrip() if narrow else "  ".join([name, *rest]).rstrip())


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    started, state = _date(row["started"]), row["state"].partition(":")[0]
    return row["folder"], started, row["verb"], f"{row['steps']} steps", _figure(row), state


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _figure(row: dict[str, Any]) -> str:
    """What the run was judged by, of its best checkpoint, else of its last evaluation."""
    found, name = (row["best"] or {}).get("evaluation") or row["evaluation"] or {}, row["measure"]
    if name not in found:
        return "-"
    value = found[name]
    if not isinstance(value, dict):
        return f"{name} {value:.4g}"
    return f"{name} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _show_one(row: dict[str, Any]) -> None:
    held_out = in_words(row["evaluation"] or {}) or "-"
    print(f"{row['folder']}: {row['verb']}, {row['steps']} steps, {row['state']}; held-out: {held_out}")
    written = _date(row["last"].pop("time", None))
    print(f"the last line of its metrics.jsonl, written {written}:" if written else "no step is done yet")
    for name, value in sorted(row["last"].items()):
        print(f"  {name:<32} {value:.6g}" if isinstance(value, int | float) else f"  {name:<32} {value}")


def explain(options: ExplainOptions) -> int:
    """Print the plan of `--verb` with `--config`: what it would do, in words. Nothing is loaded."""
    if options.verb not in CLASSES:
        raise ConfigError(f"verb is {options.verb!r}; the recipes are {', '.join(CLASSES)}")
    rows = {"data": "pairs.jsonl"}
    needed = {"sft": {"task": DemoOptions.task}} | dict.fromkeys(("dpo", "reward", "classify", "tag", "seq2seq"), rows)
    needed |= {"distill": {"task": DemoOptions.task, "teacher": "teacher"}, "pretrain": {"data": ("texts/",)}}
    given = {"overrides": needed.get(options.verb, {})} if options.config is None else {}
    plan = plan_of(load(CLASSES[options.verb], *([options.config] if options.config else []), **given))
    if options.json:
        print(json.dumps(asdict(plan)))
    else:
        print("\n".join(f"- {line}" for line in plan.words))
    return 0
