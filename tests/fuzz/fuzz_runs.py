"""Families of damaged run folders: what runs, --resume, eval, export and a new run from an old one read."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from damage_kit import inputs
from fuzz_kit import Family, damaged, damaged_json, linked
from tiny_model import tiny_folder

from upslope.build import load_inference
from upslope.cli import main
from upslope.commands.export_card import origin_of
from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.loop.expert_rows import groups_of_run
from upslope.manifest import write_manifest
from upslope.models.files.sources import resolve
from upslope.runs.folder import Run
from upslope.types import Message, Prompt, Reward, Rollout, RolloutGroup

KINDS = {kind.exit_code: kind for kind in (ConfigError, DataError, ModelError, RunError)}
WRITTEN = ("config.toml", "env.json", "metrics.jsonl", "run.db", "summary.json")


def command(*words: object) -> None:
    """Run the command; the line of a refusal is raised as the error that it was."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code:
        raise KINDS[code](err.getvalue().strip().splitlines()[-1])


def _make(folder: Path) -> Path:
    """A run of two steps with a checkpoint, rollouts and an evaluation in its database."""
    inputs(folder)
    tiny_folder(folder / "start")
    command(
        *("sft", "--data", folder / "rows.jsonl", "--model", folder / "start", "--max-steps", 2, "--batch-size", 4),
        *("--dtype", "float32", "--eval-every", 0, "--output-dir", folder / "run"),
    )
    rollouts = [
        Rollout([1, 2], [3, 4], [True, True], [-1.0, -2.0], [-1.0, -2.0], "stop", f"r{i}", i, reward=Reward(float(i)))
        for i in range(2)
    ]
    prompt = Prompt(key=1, messages=(Message("user", "What?"),))
    with Run.open(folder / "run") as run:
        run.record_rollouts(2, [RolloutGroup(prompt, rollouts)])
        run.record_evaluation(2, "held-out", {"accuracy": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 9}, "loss": 1.0})
        run.summary({**(run.result or {}), "evaluation": {"accuracy": {"value": 0.5, "low": 0.0, "high": 1.0, "n": 9}}})
    return folder / "run"


def _copy(made: Path, rng: random.Random, scratch: Path, names: Sequence[str]) -> Path:
    """The run with some of these files damaged; what is written into is a copy, the rest are links."""
    changed: dict[str, bytes | None] = {name: (made / name).read_bytes() for name in (".lock", *WRITTEN)}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(names)
        content = (made / name).read_bytes()
        if name.endswith(".json"):
            other = rng.choice([each for each in names if each.endswith((".json", ".toml"))])
            changed[name] = damaged_json(rng, content, [(made / other).read_bytes()])
        elif name.endswith(".jsonl") and rng.random() < 0.7:
            lines = content.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = damaged_json(rng, lines[at]).replace(b"\n", b" ")
            changed[name] = b"\n".join(lines) + b"\n"
        elif name == "run.db" and rng.random() < 0.5:
            changed[name] = _rows_damaged(rng, content, scratch / "other.db")
        else:
            changed[name] = damaged(rng, content, [content])
        if rng.random() < 0.05:
            changed[name] = None
    return linked(made, scratch / "run", changed)


def _rows_damaged(rng: random.Random, content: bytes, place: Path) -> bytes:
    """A sound database that says something else."""
    import sqlite3

    place.write_bytes(content)
    values: tuple[Any, ...] = (None, "x", "", b"\0\1", -1, 2**62, 1e308, "[1", "{}", "[[1]]", '{"a": [1]}', "null")
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(place)) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        table = rng.choice(tables)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        if rng.random() < 0.15:
            database.execute(f"DROP TABLE {table}")
        else:
            database.execute(f"UPDATE {table} SET {rng.choice(columns)} = ?", [rng.choice(values)])
        database.commit()
    return place.read_bytes()


def _names(made: Path) -> list[str]:
    return sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file() and not p.is_symlink())


def look(made: Path, rng: random.Random, scratch: Path) -> None:
    """`upslope runs`, the provenance that export writes, and the rollouts that expert takes up."""
    run = _copy(made, rng, scratch, WRITTEN)
    way = rng.randrange(5)
    if way == 0:
        command("runs", "--folder", run)
    elif way == 1:
        command("runs", "--folder", run, "--json")
    elif way == 2:
        command("runs", "--folder", scratch)
    elif way == 3:
        model = resolve(run)
        origin_of(model, model)
    else:
        groups_of_run(str(run), vocabulary=258, tokenizer=_Words())


class _Words:
    def decode(self, tokens: list[int], **_: object) -> str:
        return f"r{tokens and 0}"


def use(made: Path, rng: random.Random, scratch: Path) -> None:
    """The model of a run's checkpoint, as eval, serve and a new run take it."""
    names = [name for name in _names(made) if "/" in name or name in ("config.toml", "env.json")]
    run = _copy(made, rng, scratch, [name for name in names if "optimizer" not in name])
    load_inference(run if rng.random() < 0.7 else run / "checkpoints" / "last", dtype="float32")


def resume(made: Path, rng: random.Random, scratch: Path) -> None:
    """--resume, a step further."""
    names = _names(made)
    run = _copy(made, rng, scratch, WRITTEN if rng.random() < 0.4 else [n for n in names if "/" in n])
    for name in (name for name in names if "/" in name and (run / name).is_symlink()):
        (run / name).unlink()
        shutil.copyfile(made / name, run / name)
    step = next((run / "checkpoints").glob("step-*"))
    manifest, sound = step / "manifest.json", next(made.glob("checkpoints/step-*/manifest.json"))
    if manifest.is_file() and manifest.read_bytes() == sound.read_bytes():
        manifest.unlink()
        write_manifest(step, step=2, serial=1, best=False)  # so that what the sums would notice gets to its reader
    command("sft", "--resume", "--output-dir", run, "--max-steps", 3)


FAMILIES = (
    Family("run-look", "runs", _make, look, share=2.0),
    Family("run-use", "runs", _make, use, share=1.0),
    Family("run-resume", "runs", _make, resume, share=0.5, seconds=20.0),
)
