"""What surrounds every recipe's algorithm box: run folder, evaluation, checkpoints, stopping, progress, resume.

A recipe is a Learner (what it holds, and one step) inside `train`, the one training loop of the project.
"""

from __future__ import annotations

import os
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import rich.style  # noqa: F401  # draws from Python's generator when it is loaded: before the seed, not at a first table
import torch
from torch import Tensor

from upslope.build import device_of_machine
from upslope.config import LAUNCH, OBJECT, check, dump
from upslope.data.template import clock_at
from upslope.devices.hardware import choose_dtype
from upslope.errors import ConfigError, RunError, UpslopeError
from upslope.loop import fingerprint
from upslope.loop.closing import commands_of, measured, opening_words, told_when_stopped
from upslope.loop.kept import DataAccount
from upslope.loop.last_words import last_words
from upslope.loop.look import look
from upslope.options import RunOptions
from upslope.runs.folder import HELD_OUT, Run
from upslope.runs.lines import in_words
from upslope.runs.progress import Progress, told
from upslope.runs.resume import check_resume
from upslope.tasks.loading import made_first
from upslope.training import checkpoint
from upslope.training.optim import MasterAdamW
from upslope.training.random_state import capture_random_state, restore_random_state, seed_everything
from upslope.training.stopping import Budget, GracefulInterrupt, Patience, StopWhen, Target

__all__ = ["MAY_CHANGE", "Begun", "Evaluation", "Learner", "StepResult", "begin", "train"]

MAY_CHANGE = frozenset(
    {"output_dir", "resume", "allow_changed_data", "dry_run", "json", "max_steps", "max_tokens", "max_seconds"}
    | {"target", "patience", "eval_every", "eval_samples", "save_every", "keep_last", "reward_workers"}
    | {"activations_gb"}
)
"""Options that may differ from the run that is resumed: when it stops, looks and saves, not what a step computes.

A new max_steps also moves the end of a linear or cosine schedule, from the step of the resume on.
"""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step reports: metrics for the log, trained tokens for the budget."""

    metrics: Mapping[str, float]
    tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A held-out measurement; `best`, patience and target go by the metric called `measure`.

    loss: of two evaluations of equal value the one with the lower loss is the better one; None: the earlier.
    """

    measure: str
    metrics: Mapping[str, Any]
    loss: float | None = None

    @property
    def value(self) -> float:
        """The number of `measure`."""
        found = self.metrics[self.measure]
        return float(found["value"] if isinstance(found, Mapping) else found)


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a run before its learner is made: its templates' clock, and digests of its files."""

    clock: datetime
    files: Mapping[str, str]

    def marks(self, learner: Learner) -> dict[str, Any]:
        """What a checkpoint says about what its run is made of."""
        return {"clock": self.clock.isoformat(), "fingerprint": {**self.files, **fingerprint.of_learner(learner)}}


class Learner(Protocol):
    """What a recipe gives the loop."""

    higher_is_better: bool
    run: Run | None
    account: DataAccount
    """What became of the rows of its data; empty where it has none."""

    def trained_on(self) -> tuple[Any, Iterable[Any]]:
        """The tokenizer (None: a checkpoint brings it), and the training rows as plain values, in their order."""
        ...

    def step(self, step: int) -> StepResult:
        """One training step; `step` counts from 0."""
        ...

    def evaluate(self, step: int) -> Evaluation | None:
        """Measure on held-out data; None when there is nothing to measure."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint besides the model folder."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON of a checkpoint: data position, controllers."""
        ...

    def load(self, model: Path, tensors: dict[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        ...

    def write_model(self, folder: Path) -> None:
        """Write the policy as a model folder."""
        ...


@contextmanager
def begin(options: RunOptions) -> Iterator[Begun]:
    """Around a whole recipe: in it the learner is made and trained. The options are checked as the command does it.

    Within it chat templates read the run's clock: the local time at which the run began, also in a resumed one.
    RunError: a run that is resumed has other files than its last checkpoint, and --allow-changed-data is not given.
    """
    check(options)
    look(options, skip=("model",))  # a recipe may be given its policy
    files, clock = fingerprint.of_files(options), now()
    found = checkpoint.peek(Path(options.output_dir or "") / "checkpoints") if options.resume else None
    if found is not None:
        path, state = found
        with _state_errors(path.parent):
            clock = datetime.fromisoformat(state["clock"]) if "clock" in state else clock
            known = {name: digest for name, digest in state.get("fingerprint", {}).items() if name in files}
        if not options.allow_changed_data:
            fingerprint.refuse(fingerprint.changed(known, {name: files[name] for name in known}), path)
    with clock_at(clock), made_first(getattr(options, "task", None)):
        yield Begun(clock, files)


def now() -> datetime:
    """The local time, without its zone: what `strftime_now` in a template has always said."""
    return datetime.now()


def train(verb: str, options: RunOptions, learner: Learner, begun: Begun) -> dict[str, Any]:
    """Run `learner` until it stops; returns the summary, which is also in the run folder.

    A first Ctrl-C finishes the step, saves and ends with "interrupted" in the summary; the caller exits with 130.
    """
    with told("taking the fingerprint of the training rows"):
        marks = begun.marks(learner)
    run = _open(verb, options)
    mode = "max" if learner.higher_is_better else "min"
    stop = StopWhen(
        Budget(options.max_steps, options.max_tokens, options.max_seconds),
        Patience(options.patience, mode=mode),
        None if options.target is None else Target(options.target, mode=mode),
    )
    with run, told_when_stopped(verb, run), GracefulInterrupt() as interrupt:
        learner.run = run
        for line in [*learner.account.lines(), opening_words(options, learner)]:
            print(f"upslope: {line}", file=sys.stderr)
        seed_everything(options.seed)
        if options.resume:
            _restore(run, learner, stop, options, marks)
            if stop.reason is not None:
                print(f"{verb}: nothing is left to do: {stop.reason}", file=sys.stderr)
        with Progress(max(options.max_steps, stop.steps), verb, done=stop.steps) as progress:
            evaluated = _loop(run, learner, stop, interrupt, options, progress, marks)
        summary = {
            "verb": verb,
            "stopped": "interrupted" if interrupt.requested else stop.reason,
            "steps": stop.steps,
            "trained_tokens": stop.tokens,
            "seconds": round(stop.seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "evaluation": evaluated,
            **measured(run, stop),
            "commands": commands_of(
                verb, options, run.folder, stop, getattr(getattr(learner, "policy", None), "tokenizer", None)
            ),
            "data": learner.account.facts(),
            "folder": str(run.folder),
            "model": str(run.checkpoints / "last" / "model"),
            "remarks": last_words(
                run.metric_lines(), options, open_ended=getattr(getattr(learner, "task", None), "open_ended", False)
            ),
        }
        run.summary(summary)
    for remark in summary["remarks"]:
        print(f"{verb}: {remark}", file=sys.stderr)
    return summary


def _loop(
    run: Run,
    learner: Learner,
    stop: StopWhen,
    interrupt: GracefulInterrupt,
    options: RunOptions,
    progress: Progress,
    marks: Mapping[str, Any],
) -> Mapping[str, Any] | None:
    """Steps, each followed by what is due; at the end an evaluation and a checkpoint of the last step.

    Returns the last evaluation. The start of a run is measured, too, and is no candidate for the best checkpoint.
    """
    saved = stop.steps or -1
    last = run.evaluated(stop.steps) if stop.evaluated == stop.steps else None

    @contextmanager
    def saving_first() -> Iterator[None]:
        before = _Moment.of(learner)
        try:
            yield
        except UpslopeError:
            with suppress(RunError):  # a folder that was moved: the error says so
                print(_rescued(run, learner, stop, options, marks, before, saved), file=sys.stderr)
            raise

    def look(*, candidate: bool = True) -> bool:
        nonlocal last
        silent = nullcontext() if last is not None else told(f"evaluating {learner.account.held_out}")
        with saving_first(), stop.paused(), _random_state_kept(), silent:
            evaluation = learner.evaluate(stop.steps)
        if evaluation is None:
            return False
        last, stop.evaluated = dict(evaluation.metrics), stop.steps
        run.record_evaluation(stop.steps, HELD_OUT, evaluation.metrics, measure=evaluation.measure)
        run.record_evaluation(stop.steps, "spent", {"seconds": stop.seconds, "trained_tokens": stop.tokens})
        progress.note(f"{progress.label}: step {stop.steps}: {in_words(evaluation.metrics)}")
        return candidate and stop.after_evaluation(evaluation.value, evaluation.loss)

    if not stop.steps and stop.evaluated is None and options.eval_every and stop.reason is None:
        look(candidate=False)
    while stop.reason is None and not interrupt.requested:
        with saving_first():
            result = learner.step(stop.steps)
        stop.after_step(tokens=result.tokens)
        run.log(stop.steps, result.metrics)
        progress.advance(1, _headline(result.metrics))
        best = look() if options.eval_every and stop.steps % options.eval_every == 0 else False
        if best or stop.steps % options.save_every == 0:
            _save(run, learner, stop, options, marks, best=best)
            saved = stop.steps
    late = (last is None or stop.evaluated != stop.steps) and not interrupt.requested
    best = look() if late else False
    if saved != stop.steps or (late and stop.evaluated == stop.steps):  # what is evaluated, the checkpoint knows
        _save(run, learner, stop, options, marks, best=best)
    return last


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """What an evaluation draws from the global generators, training does not miss."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(*state)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in gigabytes (1e9 bytes)."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_memory_gb() -> float:
    """Resident memory of this process now, in gigabytes; where the system does not say, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory_gb()
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _open(verb: str, options: RunOptions) -> Run:
    config = dump(_of_run(options))
    dtype, reason = choose_dtype(options.dtype, device_of_machine())
    name = str(dtype).removeprefix("torch.")
    environment = {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "dtype": name}
    if not options.resume:
        return Run.create(verb=verb, config_toml=config, output_dir=options.output_dir, environment=environment)
    assert options.output_dir is not None
    run = Run.open(options.output_dir, environment=environment)
    try:
        began = _began_in(run)
        check_resume(run.config, tomllib.loads(config), MAY_CHANGE | ({"dtype"} if name == began else set()))
        if began not in (None, name):
            raise ConfigError(
                f"--resume: the run computes in {began}, and here auto is {name} ({reason}); --dtype {began}"
            )
    except BaseException:
        run.close()
        raise
    return run


def _began_in(run: Run) -> str | None:
    """The compute dtype of the run's first launch: what auto was on that machine. None where it was not noted."""
    launches = run.environment["earlier"]
    return launches[0].get("dtype") if launches else None


def _of_run(options: RunOptions) -> RunOptions:
    """The options as the run folder keeps them: what one launch is told is not the run's."""
    return replace(options, **LAUNCH)


def _restore(run: Run, learner: Learner, stop: StopWhen, options: RunOptions, marks: Mapping[str, Any]) -> None:
    """Go back to the last checkpoint; a run that was stopped before its first one begins anew.

    RunError: it is made of other things now. Then the run folder is as it was.
    """
    notes: list[str] = []

    def accept(found: checkpoint.Resolved, state: dict[str, Any]) -> None:
        state["learner"], said = fingerprint.accepted(state, learner.state(), found.path, options, run.config, marks)
        notes.extend(said)

    with _state_errors(run.checkpoints):
        found = checkpoint.resume(run.checkpoints, keep_last=options.keep_last, accept=accept)
    done = run.store.last_step() or 0
    if found is None and done > run.config.get("save_every", options.save_every):
        raise RunError(
            f"{run.checkpoints}: empty, though {done:,} steps are recorded, more than are done without one; "
            "put the checkpoints back, or start again with another --output-dir"
        )
    run.replace_config(dump(_of_run(options)))
    if found is None:
        run.rewind(0, evaluated=False)
        return
    resolved, tensors, state = found
    with _state_errors(run.checkpoints):
        stop.load_state_dict(state["stop"])
        learner.load(resolved.path / "model", tensors, state["learner"])
        notes += [resolved.note, *run.lost_records(resolved.step)]
        notes += restore_random_state(tensors.get("random", {}), state["random"])
    for note in notes:
        if note:
            print(note, file=sys.stderr)
    run.rewind(resolved.step, evaluated=stop.evaluated == resolved.step)


@dataclass(frozen=True, slots=True)
class _Moment:
    """What a checkpoint holds besides the model, and how often the weights have moved; the tensors are not copies."""

    tensors: Mapping[str, dict[str, Tensor]]
    state: Mapping[str, Any]
    updates: int

    @classmethod
    def of(cls, learner: Learner) -> _Moment:
        tensors, random = capture_random_state()
        optimizers = [x for x in vars(learner).values() if isinstance(x, MasterAdamW)]
        return cls(
            {**learner.tensors(), "random": tensors},
            {"learner": learner.state(), "random": random},
            sum(optimizer.updates for optimizer in optimizers),
        )


def _rescued(
    run: Run,
    learner: Learner,
    stop: StopWhen,
    options: RunOptions,
    marks: Mapping[str, Any],
    before: _Moment,
    saved: int,
) -> str:
    """Save what a foreseen error left of the run: its state before the step that failed. How to go on, in words."""
    moved = before.updates != _Moment.of(learner).updates
    if stop.steps and saved != stop.steps and not moved:
        try:
            _save(run, learner, stop, options, marks, best=False, at=before)
        except UpslopeError as error:
            return f"upslope: step {stop.steps} could not be saved: {error}"
        saved = stop.steps
    if saved < 1:
        return "upslope: no step had been saved yet"
    since = " (the weights had moved before the error)" if moved else ""
    again = f"upslope {run.verb} --resume --output-dir {shlex.quote(str(run.folder))}"
    if f'"{OBJECT}' in run.config_toml:
        again = f"resume=True, output_dir={str(run.folder)!r} with the same objects"
    return f"upslope: step {saved} is saved{since}; once the error below is mended: {again}"


@contextmanager
def _state_errors(checkpoints: Path) -> Iterator[None]:
    """Turns what a state that this program did not write does to those who take it up into one line."""
    try:
        yield
    except UpslopeError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{checkpoints}: the checkpoint's state.json or its tensors are not as this version of upslope writes "
            f"them ({what}); use the version named in the run's env.json, or start the run again"
        ) from error


def _save(
    run: Run,
    learner: Learner,
    stop: StopWhen,
    options: RunOptions,
    marks: Mapping[str, Any],
    *,
    best: bool,
    at: _Moment | None = None,
) -> None:
    run.flush()
    at = at or _Moment.of(learner)
    checkpoint.save(
        run.checkpoints,
        stop.steps,
        tensors=at.tensors,
        state={**at.state, "stop": stop.state_dict(), **marks},
        write_model=learner.write_model,
        keep_last=options.keep_last,
        best=best,
    )


def _headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers worth a place in the progress line."""
    names = ("reward", "loss", "objective/kl", "val/explained_variance", "tokens_per_second")
    shown = {name.rpartition("/")[2]: metrics[name] for name in names if name in metrics}
    return shown | ({"errors": metrics["reward/errors"]} if metrics.get("reward/errors") else {})
