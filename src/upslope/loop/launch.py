"""How a run begins or is taken up: its options and files looked at, its folder made or opened."""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from upslope.config import LAUNCH, check, dump
from upslope.data.template import clock_at
from upslope.devices.hardware import choose_dtype, device_of_machine
from upslope.errors import ConfigError, RunError, UpslopeError
from upslope.loop import fingerprint
from upslope.loop.learner import Learner
from upslope.loop.look import look
from upslope.options import RunOptions
from upslope.runs.folder import Run
from upslope.runs.resume import check_resume
from upslope.tasks.base import made_first
from upslope.training import checkpoint

MAY_CHANGE = frozenset(
    {"output_dir", "resume", "allow_changed_data", "dry_run", "json", "max_steps", "max_tokens", "max_seconds"}
    | {"target", "patience", "eval_every", "eval_samples", "save_every", "keep_last", "reward_workers"}
    | {"activations_gb"}
)
"""Options that may differ from the run that is resumed: when it stops, looks and saves, not what a step computes.

A new max_steps also moves the end of a linear or cosine schedule, from the step of the resume on.
"""


@dataclass(frozen=True, slots=True)
class Begun:
    """What is known of a run before its learner is made: its templates' clock, and digests of its files."""

    clock: datetime
    files: Mapping[str, str]

    def marks(self, learner: Learner) -> dict[str, Any]:
        """What a checkpoint says about what its run is made of."""
        return {"clock": self.clock.isoformat(), "fingerprint": {**self.files, **fingerprint.of_learner(learner)}}


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
        with state_errors(path.parent):
            clock = datetime.fromisoformat(state["clock"]) if "clock" in state else clock
            known = {name: digest for name, digest in state.get("fingerprint", {}).items() if name in files}
        if not options.allow_changed_data:
            fingerprint.refuse(fingerprint.changed(known, {name: files[name] for name in known}), path)
    with clock_at(clock), made_first(getattr(options, "task", None)):
        yield Begun(clock, files)


def now() -> datetime:
    """The local time, without its zone: what `strftime_now` in a template has always said."""
    return datetime.now()


def open_run(verb: str, options: RunOptions) -> Run:
    config = dump(of_run(options))
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


def of_run(options: RunOptions) -> RunOptions:
    """The options as the run folder keeps them: what one launch is told is not the run's."""
    return replace(options, **LAUNCH)


@contextmanager
def state_errors(checkpoints: Path) -> Iterator[None]:
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
