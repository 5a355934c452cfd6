"""The run folder: everything a run leaves behind, in files other tools can read.

config.toml     the resolved configuration; `upslope VERB --config config.toml` runs it again
env.json        versions, machine, command line of the last launch, and under "earlier" of those before
metrics.jsonl   one JSON object per line: step, time, metrics; an evaluation's metrics are called eval/...
run.db          SQLite: metrics, rollouts with their token arrays, evaluations (see `Store`)
checkpoints/    step-N folders, `last` and `best`
summary.json    the result, written when the run ends
"""

import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from upslope.atomic import clean_leftovers, is_temporary, read_object, refuse_other_than_file, saving, write_atomic
from upslope.errors import RunError
from upslope.runs.encoding import as_number, to_json
from upslope.runs.environment import describe_environment
from upslope.runs.lines import MetricLines, evaluation_keys, is_evaluation, read_lines
from upslope.runs.lock import LOCK_NAME, FolderLock, owner_of, writer_of
from upslope.runs.store import Store
from upslope.types import RolloutGroup

# What a process killed while it made the folder may have left, after the signed lock; config.toml is written last.
_FILES = {LOCK_NAME, "env.json", "metrics.jsonl", "run.db", "run.db-wal", "run.db-shm", "run.db-journal"}
_BEFORE_CONFIG = _FILES | {"checkpoints"}

_read_json = partial(read_object, error=RunError, remedy="restore or remove the file")

HELD_OUT = "held-out"
"""The evaluation that a run's own held-out measures are stored as."""


class Run:
    """An open run folder. Make one with `Run.create` or `Run.open`; a context manager.

    Attributes: folder, read_only, store (for reading; write through the methods here), checkpoints (the folder).

    Order matters for an exact resume: record everything of step k, then `flush`, then save the checkpoint of step k.
    After a kill, `rewind(k)` then makes all files equal to those of a run that was never stopped (times apart).
    """

    def __init__(self, folder: Path, *, store: Store, lines: MetricLines | None, lock: FolderLock | None) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.store = store
        self.read_only = lock is None
        self._lines = lines
        self._lock = lock
        self._summary_is_stale = True

    @classmethod
    def create(
        cls,
        root: Path | str = "runs",
        *,
        verb: str,
        config_toml: str,
        name: str | None = None,
        output_dir: Path | str | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> Self:
        """Starts a new run in `output_dir`, or in a new folder ROOT/VERB-NAME (default name: date and time).

        Args:
            root: where runs are collected.
            verb: what runs ("ppo").
            config_toml: the resolved configuration as TOML text.
            name: the folder's name after the verb.
            output_dir: exactly this folder instead; made if absent, else it must be empty.
            environment: further entries for env.json (device, dtype).

        Raises:
            RunError: the folder already holds a run or something else, is unwritable, or the disk is full.
        """
        if output_dir is not None:
            folder = Path(output_dir)
            with saving(folder, "make the run folder"):
                folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = _new_folder(Path(root), verb, name)
        _refuse_occupied(folder, signed=False)
        with ExitStack() as on_failure:
            lock = FolderLock(folder)
            on_failure.callback(lock.release)
            _refuse_occupied(folder, signed=True)  # Again: another process may have been faster.
            run = cls._start(folder, lock, {"verb": verb, **(environment or {})})
            on_failure.callback(run.close)
            write_atomic(folder / "config.toml", config_toml)
            on_failure.pop_all()
        return run

    @classmethod
    def open(cls, folder: Path | str, *, read_only: bool = False, environment: Mapping[str, Any] | None = None) -> Self:
        """Opens an existing run: to continue it (locked, repaired, a new launch noted in env.json) or only to look.

        Raises:
            RunError: not a run folder, written by another process, unwritable, damaged.
        """
        folder = Path(folder)
        if not (folder / "config.toml").is_file():
            raise RunError(
                f"{folder}: not a run folder (it has no config.toml); look under runs/ for its name; "
                "a run that was killed while it was made starts again without --resume"
            )
        if read_only:
            return cls(folder, store=Store(folder / "run.db", read_only=True), lines=None, lock=None)
        return cls._start(folder, FolderLock(folder), environment or {})

    @classmethod
    def _start(cls, folder: Path, lock: FolderLock, environment: Mapping[str, Any]) -> Self:
        """Opens the files of a locked folder; gives the lock back when that fails."""
        checkpoints = folder / "checkpoints"
        with ExitStack() as on_failure:
            on_failure.callback(lock.release)
            for name in sorted(_FILES | {"config.toml", "summary.json"}):
                refuse_other_than_file(folder / name)
            if checkpoints.is_symlink() and not checkpoints.is_dir():
                raise RunError(
                    f"{checkpoints}: a link to {os.readlink(checkpoints)}, where no folder is; bring it back"
                )
            with saving(checkpoints, "make the folder"):
                checkpoints.mkdir(exist_ok=True)
            clean_leftovers(folder, exclusive=True)
            clean_leftovers(checkpoints, exclusive=True)
            write_atomic(folder / "env.json", to_json(_next_launch(folder, environment), indent=2) + "\n")
            lines = MetricLines(folder / "metrics.jsonl")
            on_failure.callback(lines.close)
            run = cls(folder, store=Store(folder / "run.db"), lines=lines, lock=lock)
            on_failure.callback(run.store.close)
            if (verb := run.environment.get("verb")) not in (None, "", run.verb):
                run.store.set_meta("verb", verb)
            on_failure.pop_all()
        return run

    # What the run is

    @property
    def verb(self) -> str:
        """What runs, as given to `create`."""
        return self.store.meta("verb") or ""

    @property
    def measure(self) -> str | None:
        """The held-out metric that the run is judged by; None until it was measured."""
        return self.store.meta("measure")

    @property
    def config_toml(self) -> str:
        """The text of config.toml."""
        with saving(self.folder / "config.toml", "read"):
            return (self.folder / "config.toml").read_text()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        try:
            return tomllib.loads(self.config_toml)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{self.folder / 'config.toml'}: not TOML: {error}") from error

    @property
    def environment(self) -> dict[str, Any]:
        """The content of env.json."""
        return _read_json(self.folder / "env.json")

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of summary.json, None while the run is not finished."""
        path = self.folder / "summary.json"
        return _read_json(path) if path.is_file() else None

    def writer(self) -> dict[str, Any] | None:
        """{"pid", "host", "started"} of the process that writes the run now, None when it is not running."""
        return writer_of(self.folder)

    def metric_lines(self) -> list[dict[str, Any]]:
        """The steps' records in metrics.jsonl so far, without those of evaluations."""
        path = self.folder / "metrics.jsonl"
        return [line for line in read_lines(path) if not is_evaluation(line)] if path.is_file() else []

    def evaluated(self, step: int) -> dict[str, Any] | None:
        """What the held-out evaluation of a step said, as it was given to `record_evaluation`; None: there is none."""
        return {
            row.metric: row.value
            if row.low is None
            else {"value": row.value, "low": row.low, "high": row.high, "n": row.n, **row.details}
            for row in self.store.evaluations(HELD_OUT)
            if row.step == step
        } or None

    def lost_records(self, step: int) -> list[str]:
        """A line for each file that lacks metrics of the steps 1 to `step`, which a checkpoint says were done."""
        known = {
            "metrics.jsonl": {line.get("step") for line in self.metric_lines()},
            "run.db": self.store.metric_steps(),
        }
        lost = {name: [each for each in range(1, step + 1) if each not in steps] for name, steps in known.items()}
        return [
            f"{self.folder / name}: deleted or cut: the records of {len(steps):,} of {step:,} steps are missing "
            f"({steps[0]} to {steps[-1]}); the training goes on from its checkpoint and loses nothing"
            for name, steps in lost.items()
            if steps
        ]

    # Writing

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the step's metrics (numbers) in metrics.jsonl and run.db.

        Raises:
            TypeError: a value that is no number. ValueError: a negative step, or a metric named step or time.
            RunError: full disk.
        """
        lines = self._writable(step)
        if metrics.keys() & {"step", "time"}:
            raise ValueError("a metric cannot be named 'step' or 'time'")
        numbers = {name: as_number(value, name) for name, value in metrics.items()}
        now = time.time()
        if self._summary_is_stale:
            # The summary of an earlier launch stops being true with the first step after it.
            with saving(self.folder / "summary.json", "remove"):
                (self.folder / "summary.json").unlink(missing_ok=True)
            self._summary_is_stale = False
        lines.append({"step": step, "time": round(now, 3), **numbers})
        self.store.add_metrics(step, numbers, wall_time=now)

    def record_rollouts(self, step: int, groups: Sequence[RolloutGroup], **details: Any) -> None:
        """Stores rollouts with their token arrays; the arguments are those of `Store.add_rollouts`."""
        self._writable(step)
        self.store.add_rollouts(step, groups, **details)

    def record_evaluation(
        self, step: int, name: str, metrics: Mapping[str, float | Mapping[str, Any]], *, measure: str | None = None
    ) -> None:
        """Stores evaluated numbers: metric -> number, or {"value", "low", "high", "n", further details}.

        The held-out ones also become a line of metrics.jsonl, an interval as eval/NAME/low and eval/NAME/high; of
        them the one called `measure` is what the run is judged by.
        """
        lines = self._writable(step)
        self.store.add_evaluation(step, name, metrics)
        if measure is not None:
            self.store.set_meta("measure", measure)
        if name == HELD_OUT:
            lines.append({"step": step, "time": round(time.time(), 3), **evaluation_keys(metrics)})

    def rewind(self, step: int, *, evaluated: bool = True) -> None:
        """Forgets everything recorded after `step`, because the run continues from the checkpoint of `step`.

        evaluated: that checkpoint knows of the evaluation at its own step; else that is forgotten, too.
        """
        lines = self._writable()
        self.store.rewind(step, evaluated=evaluated)
        lines.keep_until(step, evaluated=evaluated)

    def replace_config(self, config_toml: str) -> None:
        """Writes the configuration a continued run now has; the one before stays as config.N.toml."""
        self._writable()
        before = self.config_toml
        if before == config_toml:
            return
        kept = (self.folder / f"config.{number}.toml" for number in count(1))
        write_atomic(next(path for path in kept if not path.exists()), before)
        write_atomic(self.folder / "config.toml", config_toml)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json in one step."""
        self._writable()
        write_atomic(self.folder / "summary.json", to_json(values, indent=2) + "\n")
        self._summary_is_stale = False

    def flush(self) -> None:
        """Makes everything recorded so far durable; call it before saving a checkpoint."""
        self._writable().flush()
        self.store.flush()

    def close(self) -> None:
        """Closes the files and gives the lock back; may be called twice."""
        self.store.close()
        if self._lines is not None:
            self._lines.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _writable(self, step: int = 0) -> MetricLines:
        if self._lines is None or self._lock is None:
            raise RunError(f"{self.folder}: opened read-only; use Run.open(folder) to continue the run")
        self._lock.confirm()
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer >= 0, not {step!r}")
        return self._lines


def _new_folder(root: Path, verb: str, name: str | None) -> Path:
    if name is not None and (not name or name != Path(name).name):
        raise RunError(f"run name {name!r} must be a plain file name")
    given = f"{verb}-{name or time.strftime('%m%d-%H%M%S')}"
    with saving(root / given, "make the run folder"):
        root.mkdir(parents=True, exist_ok=True)
        for number in range(1, 1000):
            folder = root / (given if number == 1 else f"{given}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
            if name is not None:
                return folder
    raise RunError(f"{root}: no free name for a run; choose --output-dir")


def _refuse_occupied(folder: Path, *, signed: bool) -> None:
    """Refuses what holds a run or anything else; files named like a run's are one only beside a lock that is signed."""
    with saving(folder, "read the folder"):
        sizes = {path.name: path.lstat().st_size for path in sorted(folder.iterdir())}
        if sizes.keys() >= {"config.toml", "env.json"}:
            raise RunError(f"{folder}: already holds a run; continue it with --resume, or choose another --output-dir")
        foreign = [name for name in sizes if name not in _BEFORE_CONFIG and not is_temporary(name)]
        metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
        begun = (metrics.is_file() and metrics.stat().st_size) or (checkpoints.is_dir() and any(checkpoints.iterdir()))
        if begun and not foreign:
            raise RunError(f"{folder}: holds a run without config.toml; restore that, or choose another --output-dir")
        sizes.pop("checkpoints", None)
        if not signed and sizes and sizes != {LOCK_NAME: 0} and not owner_of(folder):
            foreign = foreign or list(sizes)
        if foreign:
            raise RunError(
                f"{folder}: not empty ({foreign[0]} ...) and not a run; choose another --output-dir or empty it"
            )


def _next_launch(folder: Path, environment: Mapping[str, Any]) -> dict[str, Any]:
    before = _read_json(folder / "env.json") if (folder / "env.json").is_file() else {}
    earlier = before.pop("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(launch, dict) for launch in earlier):
        raise RunError(f"{folder / 'env.json'}: earlier = {earlier!r:.60} is no list of launches; restore the file")
    if before and (folder / "config.toml").is_file():
        earlier.append(before)
    verb = {"verb": before["verb"]} if "verb" in before else {}
    return {**describe_environment(), **verb, **environment, "earlier": earlier}
