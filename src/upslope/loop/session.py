"""The training loop around every recipe: evaluation, checkpoints, stopping, progress, resume.

A recipe is a Learner (what it holds, and one step) inside `train`, the one training loop of the project.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.style  # noqa: F401  # draws from Python's generator when it is loaded: before the seed, not at a first table
from torch import Tensor

from upslope.build import Policy
from upslope.config import OBJECT, dump
from upslope.errors import ConfigError, RunError, UpslopeError
from upslope.loop import fingerprint
from upslope.loop.closing import commands_of, last_words, measured, opening_words, told_when_stopped
from upslope.loop.launch import Begun, begin, of_run, open_run, state_errors
from upslope.loop.learner import Learner
from upslope.models.encoder.items import Start
from upslope.options import RunOptions
from upslope.runs.folder import HELD_OUT, Run
from upslope.runs.lines import in_words
from upslope.runs.progress import Progress, told
from upslope.training import checkpoint
from upslope.training.checkpoint import capture_random_state, restore_random_state, seed_everything
from upslope.training.optim import MasterAdamW
from upslope.training.stopping import Budget, GracefulInterrupt, Patience, StopWhen


@dataclass(frozen=True, slots=True)
class Recipe:
    """A verb as a function: `recipe(options)` trains and returns the summary.

    `make_learner(options, given)` is what a run trains, in a `with`. A policy that is already loaded (of classify and
    tag a `start`) is trained in place.
    """

    verb: str
    make_learner: Callable[..., Any]

    def __call__(self, options: Any, *, policy: Policy | None = None, start: Start | None = None) -> dict[str, Any]:
        """Train, and return the summary that is also in the run folder."""
        if options.dry_run:
            raise ConfigError("dry_run: a recipe trains; `upslope.preview.dry_run.run(options)` shows what it would do")
        with begin(options) as begun, self.make_learner(options, policy or start) as learner:
            return learner.reported(train(self.verb, learner.options, learner, begun))


def train(verb: str, options: RunOptions, learner: Learner, begun: Begun) -> dict[str, Any]:
    """Run `learner` until it stops; returns the summary, which is also in the run folder.

    A first Ctrl-C finishes the step, saves and ends with "interrupted" in the summary; the caller exits with 130.
    """
    with told("taking the fingerprint of the training rows"):
        marks = begun.marks(learner)
    run = open_run(verb, options)
    with run, told_when_stopped(verb, run), GracefulInterrupt() as interrupt:
        learner.run = run
        for line in [*learner.account.lines(), opening_words(options, learner)]:
            print(f"upslope: {line}", file=sys.stderr)
        seed_everything(options.seed)
        training = _Training(run, learner, options, marks)
        summary = training.go(verb, interrupt)
        run.summary(summary)
    for remark in summary["remarks"]:
        print(f"{verb}: {remark}", file=sys.stderr)
    return summary


class _Training:
    """One launch of a run: what it trains, when it stops, what its checkpoints are marked with."""

    def __init__(self, run: Run, learner: Learner, options: RunOptions, marks: Mapping[str, Any]) -> None:
        self.run, self.learner, self.options, self.marks = run, learner, options, marks
        mode = "max" if learner.higher_is_better else "min"
        self.stop = StopWhen(
            Budget(options.max_steps, options.max_tokens, options.max_seconds),
            Patience(options.patience, mode=mode),
            options.target,
        )
        self.saved = -1
        self.last: Mapping[str, Any] | None = None

    def go(self, verb: str, interrupt: GracefulInterrupt) -> dict[str, Any]:
        """From where the run stands to its end; the summary."""
        run, learner, options, stop = self.run, self.learner, self.options, self.stop
        if options.resume:
            self.restore()
            if stop.reason is not None:
                print(f"{verb}: nothing is left to do: {stop.reason}", file=sys.stderr)
        with Progress(max(options.max_steps, stop.steps), verb, done=stop.steps) as progress:
            self.loop(interrupt, progress)
        tokenizer = getattr(getattr(learner, "policy", None), "tokenizer", None)
        open_ended = getattr(getattr(learner, "task", None), "open_ended", False)
        return {
            "verb": verb,
            "stopped": "interrupted" if interrupt.requested else stop.reason,
            "steps": stop.steps,
            "trained_tokens": stop.tokens,
            "seconds": round(stop.seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "evaluation": self.last,
            **measured(run, stop),
            "commands": commands_of(verb, options, run.folder, stop, tokenizer),
            "data": learner.account.facts(),
            "folder": str(run.folder),
            "model": str(run.checkpoints / "last" / "model"),
            "remarks": last_words(run.metric_lines(), options, open_ended=open_ended),
        }

    def loop(self, interrupt: GracefulInterrupt, progress: Progress) -> None:
        """Steps, each followed by what is due; at the end an evaluation and a checkpoint of the last step.

        The start of a run is measured, too, and is no candidate for the best checkpoint.
        """
        run, options, stop = self.run, self.options, self.stop
        self.saved = stop.steps or -1
        self.last = run.evaluated(stop.steps) if stop.evaluated == stop.steps else None
        if not stop.steps and stop.evaluated is None and options.eval_every and stop.reason is None:
            self.evaluate(progress, candidate=False)
        while stop.reason is None and not interrupt.requested:
            with self.saving_first():
                result = self.learner.step(stop.steps)
            stop.after_step(tokens=result.tokens)
            run.log(stop.steps, result.metrics)
            progress.advance(1, _headline(result.metrics))
            best = self.evaluate(progress) if options.eval_every and stop.steps % options.eval_every == 0 else False
            if best or stop.steps % options.save_every == 0:
                self.save(best=best)
        late = (self.last is None or stop.evaluated != stop.steps) and not interrupt.requested
        best = self.evaluate(progress) if late else False
        if self.saved != stop.steps or (late and stop.evaluated == stop.steps):  # it knows what is evaluated
            self.save(best=best)

    def evaluate(self, progress: Progress, *, candidate: bool = True) -> bool:
        """Measure on held-out data and record it; whether it is the best so far."""
        run, stop = self.run, self.stop
        silent = nullcontext() if self.last is not None else told(f"evaluating {self.learner.account.held_out}")
        with self.saving_first(), stop.paused(), _random_state_kept(), silent:
            evaluation = self.learner.evaluate(stop.steps)
        if evaluation is None:
            return False
        self.last, stop.evaluated = dict(evaluation.metrics), stop.steps
        run.record_evaluation(stop.steps, HELD_OUT, evaluation.metrics, measure=evaluation.measure)
        run.record_evaluation(stop.steps, "spent", {"seconds": stop.seconds, "trained_tokens": stop.tokens})
        progress.note(f"{progress.label}: step {stop.steps}: {in_words(evaluation.metrics)}")
        return candidate and stop.after_evaluation(evaluation.value, evaluation.loss)

    def save(self, *, best: bool, at: _Moment | None = None) -> None:
        """A checkpoint of the last step."""
        self.run.flush()
        at = at or _Moment.of(self.learner)
        checkpoint.save(
            self.run.checkpoints,
            self.stop.steps,
            tensors=at.tensors,
            state={**at.state, "stop": self.stop.state_dict(), **self.marks},
            write_model=self.learner.write_model,
            keep_last=self.options.keep_last,
            best=best,
        )
        self.saved = self.stop.steps

    @contextmanager
    def saving_first(self) -> Iterator[None]:
        """Around what may fail: after a foreseen error, the run's state before it is saved, where that can be."""
        before = _Moment.of(self.learner)
        try:
            yield
        except UpslopeError:
            with suppress(RunError):  # a folder that was moved: the error says so
                print(self.rescued(before), file=sys.stderr)
            raise

    def rescued(self, before: _Moment) -> str:
        """Save what a foreseen error left: the state before the step that failed. How to go on, in words."""
        run, stop = self.run, self.stop
        moved = before.updates != _Moment.of(self.learner).updates
        if stop.steps and self.saved != stop.steps and not moved:
            try:
                self.save(best=False, at=before)
            except UpslopeError as error:
                return f"upslope: step {stop.steps} could not be saved: {error}"
        if self.saved < 1:
            return "upslope: no step had been saved yet"
        since = " (the weights had moved before the error)" if moved else ""
        again = f"upslope {run.verb} --resume --output-dir {shlex.quote(str(run.folder))}"
        if f'"{OBJECT}' in run.config_toml:
            again = f"resume=True, output_dir={str(run.folder)!r} with the same objects"
        return f"upslope: step {self.saved} is saved{since}; once the error below is mended: {again}"

    def restore(self) -> None:
        """Go back to the last checkpoint; a run that was stopped before its first one begins anew.

        RunError: it is made of other things now. Then the run folder is as it was.
        """
        run, learner, stop, options = self.run, self.learner, self.stop, self.options
        notes: list[str] = []

        def accept(found: checkpoint.Resolved, state: dict[str, Any]) -> None:
            accepted = fingerprint.accepted(state, learner.state(), found.path, options, run.config, self.marks)
            state["learner"], said = accepted
            notes.extend(said)

        with state_errors(run.checkpoints):
            found = checkpoint.resume(run.checkpoints, keep_last=options.keep_last, accept=accept)
        done = run.store.last_step() or 0
        if found is None and done > run.config.get("save_every", options.save_every):
            raise RunError(
                f"{run.checkpoints}: empty, though {done:,} steps are recorded, more than are done without one; "
                "put the checkpoints back, or start again with another --output-dir"
            )
        run.replace_config(dump(of_run(options)))
        if found is None:
            run.rewind(0, evaluated=False)
            return
        resolved, tensors, state = found
        with state_errors(run.checkpoints):
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
        held = [x for part in (learner, *getattr(learner, "parts", ())) for x in vars(part).values()]
        optimizers = {id(x): x for x in held if isinstance(x, MasterAdamW)}
        return cls(
            {**learner.tensors(), "random": tensors},
            {"learner": learner.state(), "random": random},
            sum(optimizer.updates for optimizer in optimizers.values()),
        )


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


def _headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers worth a place in the progress line."""
    names = ("reward", "loss", "objective/kl", "val/explained_variance", "tokens_per_second")
    shown = {name.rpartition("/")[2]: metrics[name] for name in names if name in metrics}
    return shown | ({"errors": metrics["reward/errors"]} if metrics.get("reward/errors") else {})
