"""What surrounds every recipe's algorithm box: run folder, evaluation, checkpoints, stopping, progress, resume.

A recipe is a Learner (what it holds, and one step) inside `train`, the one training loop of the project.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from upslope.backends.hardware import choose_dtype
from upslope.build import device_of_machine
from upslope.config import dump
from upslope.data.template import clock_at
from upslope.errors import ConfigError, RunError, UpslopeError
from upslope.options import RunOptions
from upslope.recipes import fingerprint
from upslope.recipes.kept import DataAccount
from upslope.recipes.last_words import last_words
from upslope.runs.folder import Run
from upslope.runs.progress import Progress
from upslope.runs.resume import check_resume
from upslope.training import checkpoint
from upslope.training.random_state import capture_random_state, restore_random_state, seed_everything
from upslope.training.stopping import Budget, GracefulInterrupt, Patience, StopWhen, Target

__all__ = ["MAY_CHANGE", "Begun", "Evaluation", "Learner", "StepResult", "begin", "conclude", "train"]

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
    """A held-out measurement; `value` is what `best`, patience and target go by."""

    value: float
    metrics: Mapping[str, Any]


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
    """Around a whole recipe: in it the learner is made and trained.

    Within it chat templates read the run's clock: the local time at which the run began, also in a resumed one.
    RunError: a run that is resumed has other files than its last checkpoint, and --allow-changed-data is not given.
    """
    files, clock = fingerprint.of_files(options), now()
    found = checkpoint.peek(Path(options.output_dir or "") / "checkpoints") if options.resume else None
    if found is not None:
        path, state = found
        with _state_errors(path.parent):
            clock = datetime.fromisoformat(state["clock"]) if "clock" in state else clock
            known = {name: digest for name, digest in state.get("fingerprint", {}).items() if name in files}
        if not options.allow_changed_data:
            fingerprint.refuse(fingerprint.changed(known, {name: files[name] for name in known}), path)
    with clock_at(clock):
        yield Begun(clock, files)


def now() -> datetime:
    """The local time, without its zone: what `strftime_now` in a template has always said."""
    return datetime.now()


def train(verb: str, options: RunOptions, learner: Learner, begun: Begun, *, label: str = "") -> dict[str, Any]:
    """Run `learner` until it stops; returns the summary, which is also in the run folder.

    A first Ctrl-C finishes the step, saves and ends with "interrupted" in the summary; the caller exits with 130.
    """
    marks = begun.marks(learner)
    run = _open(verb, options)
    mode = "max" if learner.higher_is_better else "min"
    stop = StopWhen(
        Budget(options.max_steps, options.max_tokens, options.max_seconds),
        Patience(options.patience, mode=mode),
        None if options.target is None else Target(options.target, mode=mode),
    )
    with run, GracefulInterrupt() as interrupt:
        learner.run = run
        for line in learner.account.lines():
            print(f"upslope: {line}", file=sys.stderr)
        seed_everything(options.seed)
        if options.resume:
            _restore(run, learner, stop, options, marks)
        with Progress(options.max_steps, label or verb, done=stop.steps) as progress:
            evaluated = _loop(run, learner, stop, interrupt, options, progress, marks)
        summary = {
            "verb": verb,
            "stopped": "interrupted" if interrupt.requested else stop.reason,
            "steps": stop.steps,
            "trained_tokens": stop.tokens,
            "seconds": round(stop.seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "evaluation": dict(evaluated.metrics) if evaluated else None,
            "data": learner.account.facts(),
            "folder": str(run.folder),
            "model": str(run.checkpoints / "last" / "model"),
            "remarks": last_words(
                run.metric_lines(), options, open_ended=getattr(getattr(learner, "task", None), "open_ended", False)
            ),
        }
        run.summary(summary)
    for remark in summary["remarks"]:
        print(f"{label or verb}: {remark}", file=sys.stderr)
    return summary


def _loop(
    run: Run,
    learner: Learner,
    stop: StopWhen,
    interrupt: GracefulInterrupt,
    options: RunOptions,
    progress: Progress,
    marks: Mapping[str, Any],
) -> Evaluation | None:
    """Steps, each followed by what is due; at the end an evaluation and a checkpoint of the last step."""
    saved = stop.steps or -1
    evaluation: Evaluation | None = None
    evaluated_at = -1

    def look() -> bool:
        nonlocal evaluation, evaluated_at
        try:
            with stop.paused():
                evaluation, evaluated_at = learner.evaluate(stop.steps), stop.steps
        except UpslopeError:
            _save(run, learner, stop, options, marks, best=False)
            raise
        if evaluation is None:
            return False
        run.record_evaluation(stop.steps, "held-out", evaluation.metrics)
        run.record_evaluation(stop.steps, "spent", {"seconds": stop.seconds, "trained_tokens": stop.tokens})
        progress.note(f"{progress.label}: step {stop.steps}: {_in_words(evaluation.metrics)}")
        return stop.after_evaluation(evaluation.value)

    while stop.reason is None and not interrupt.requested:
        result = learner.step(stop.steps)
        stop.after_step(tokens=result.tokens)
        run.log(stop.steps, result.metrics)
        progress.advance(1, _headline(result.metrics))
        best = look() if options.eval_every and stop.steps % options.eval_every == 0 else False
        if best or stop.steps % options.save_every == 0:
            _save(run, learner, stop, options, marks, best=best)
            saved = stop.steps
    best = look() if evaluated_at != stop.steps and not interrupt.requested else False
    if best or saved != stop.steps:
        _save(run, learner, stop, options, marks, best=best)
    return evaluation


def exit_code(summary: Mapping[str, Any]) -> int:
    """130 after Ctrl-C, else 0."""
    return GracefulInterrupt.exit_code if summary["stopped"] == "interrupted" else 0


def conclude(options: RunOptions, summary: Mapping[str, Any]) -> int:
    """The end of a training verb: the summary on standard output where --json asks for it, and the exit code."""
    if options.json:
        print(json.dumps(summary))
    return exit_code(summary)


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
    """The options as the run folder keeps them: how one launch takes the run up is not the run's."""
    return replace(options, resume=False, allow_changed_data=False)


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
    run.replace_config(dump(_of_run(options)))
    if found is None:
        run.rewind(0)
        return
    resolved, tensors, state = found
    with _state_errors(run.checkpoints):
        stop.load_state_dict(state["stop"])
        learner.load(resolved.path / "model", tensors, state["learner"])
        notes += [resolved.note, *restore_random_state(tensors.get("random", {}), state["random"])]
    for note in notes:
        if note:
            print(note, file=sys.stderr)
    run.rewind(resolved.step)


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
    run: Run, learner: Learner, stop: StopWhen, options: RunOptions, marks: Mapping[str, Any], *, best: bool
) -> None:
    run.flush()
    random_tensors, random = capture_random_state()
    checkpoint.save(
        run.checkpoints,
        stop.steps,
        tensors={**learner.tensors(), "random": random_tensors},
        state={"learner": learner.state(), "stop": stop.state_dict(), "random": random, **marks},
        write_model=learner.write_model,
        keep_last=options.keep_last,
        best=best,
    )


def _in_words(metrics: Mapping[str, Any]) -> str:
    """Held-out numbers in one line, intervals in brackets."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            lost = f", {value['errors']} not judged" if value.get("errors") else ""
            parts.append(f"{name} {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}] n={value['n']}{lost}")
        else:
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


def _headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers worth a place in the progress line."""
    names = ("reward", "loss", "objective/kl", "val/explained_variance", "tokens_per_second")
    shown = {name.rpartition("/")[2]: metrics[name] for name in names if name in metrics}
    return shown | ({"errors": metrics["reward/errors"]} if metrics.get("reward/errors") else {})
