"""When a run ends: a target reached, a budget spent, no more progress, or Ctrl-C."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, Self

from upslope.errors import ConfigError

Mode = Literal["max", "min"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend; None means without limit. `max_seconds` counts the time of all launches together,
    evaluations left out.

    Raises:
        ConfigError: a limit that is negative or NaN.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "max_seconds"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise ConfigError(f"{name} {limit} must be >= 0")

    def reason(self, *, steps: int, tokens: int, seconds: float) -> str | None:
        """What is spent, in words, or None."""
        if self.max_steps is not None and steps >= self.max_steps:
            past = f"{steps} steps done, and {self.max_steps} are asked for"
            return f"max_steps: {past if steps > self.max_steps else f'{steps} of {self.max_steps} steps done'}"
        if self.max_tokens is not None and tokens >= self.max_tokens:
            return f"max_tokens: {tokens} of {self.max_tokens} tokens used"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return f"max_seconds: {seconds:.0f} of {self.max_seconds:g} seconds used"
        return None


class Patience:
    """Remembers the best evaluation and counts those since that were no better.

    Args:
        patience: so many evaluations in a row without improvement are enough; None: never, only the best is kept.
        mode: "max" if greater is better.
    """

    def __init__(self, patience: int | None, *, mode: Mode = "max") -> None:
        if patience is not None and patience < 1:
            raise ConfigError(f"patience {patience} must be >= 1")
        if mode not in ("max", "min"):
            raise ConfigError(f"mode {mode!r} must be 'max' or 'min'")
        self.patience = patience
        self.mode: Mode = mode
        self.best: float | None = None
        self.loss: float | None = None
        self.waited = 0

    def is_better(self, value: float, than: float) -> bool:
        """True when `value` improves on `than`; NaN never does."""
        return value > than if self.mode == "max" else value < than

    def update(self, value: float, loss: float | None = None) -> bool:
        """Takes in one evaluation; True when it is the best so far (the checkpoint to keep as `best`).

        loss: of two equal values the one with the lower loss is the better one; against patience it does not count.
        """
        improved = not math.isnan(value) if self.best is None else self.is_better(value, self.best)
        self.waited = 0 if improved else self.waited + 1
        lower = loss is not None and (self.loss is None or loss < self.loss)
        is_best = improved or (value == self.best and lower)
        if is_best:
            self.best, self.loss = value, loss
        return is_best

    @property
    def exhausted(self) -> bool:
        """True when `patience` evaluations in a row brought nothing."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold (JSON)."""
        return {"best": self.best, "waited": self.waited, "loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        best, loss, self.waited = state["best"], state.get("loss"), int(state["waited"])
        self.best, self.loss = (value if value is None else float(value) for value in (best, loss))


class StopWhen:
    """Counts what a run has spent and says when it ends.

        stop = StopWhen(Budget(max_steps=100), Patience(5), 0.9)
        while stop.reason is None:
            ...
            stop.after_step(tokens=batch_tokens)
            if evaluate: is_best = stop.after_evaluation(accuracy)

    target: the value of an evaluation that is good enough, in the direction of `patience`.

    Attributes: steps, tokens (so far, over all launches), reason (None while the run goes on), evaluated (the step of
    the last evaluation) and best_step (that of the best one).
    """

    def __init__(
        self,
        budget: Budget,
        patience: Patience | None = None,
        target: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.patience, self.target = budget, patience or Patience(None), target
        self.steps = self.tokens = 0
        self.evaluated: int | None = None
        self.best_step: int | None = None
        self._clock = clock
        self._started = clock()
        self._seconds_before = 0.0
        self._by_evaluation: str | None = None

    @property
    def seconds(self) -> float:
        """Time spent training, earlier launches included."""
        return self._seconds_before + self._clock() - self._started

    @property
    def reason(self) -> str | None:
        """Why the run ends now, in words, or None."""
        return self._by_evaluation or self.budget.reason(steps=self.steps, tokens=self.tokens, seconds=self.seconds)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside costs no seconds of the budget: evaluations, which train nothing."""
        began = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - began

    def after_step(self, *, tokens: int = 0) -> None:
        """One step is done; `tokens` were spent on it."""
        self.steps += 1
        self.tokens += tokens

    def after_evaluation(self, value: float, loss: float | None = None) -> bool:
        """One evaluation is done; True when it is the best so far (`loss` breaks ties)."""
        self.evaluated = self.steps
        if is_best := self.patience.update(value, loss):
            self.best_step = self.steps
        # What an evaluation said is not taken back by a later one.
        self._by_evaluation = self._judged(value) or self._by_evaluation
        return is_best

    def _judged(self, value: float | None) -> str | None:
        """Why the run ends with an evaluation of this value, in words, or None."""
        goal = self.target
        if goal is not None and value is not None and (value == goal or self.patience.is_better(value, goal)):
            return f"target: {value:g} reached {goal:g}"
        if self.patience.exhausted:
            return f"patience: no improvement on {self.patience.best} in {self.patience.waited} evaluations"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold (JSON). Why a run ended is not part of it: a resumed run may have new limits."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "patience": self.patience.state_dict(),
            "evaluated": self.evaluated,
            "best_step": self.best_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the counts of `state`; the limits are those given to this object."""
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])
        self._seconds_before, self._started = float(state["seconds"]), self._clock()
        self.patience.load_state_dict(state["patience"])
        # Of an older version: whatever was evaluated by then is recorded.
        self.evaluated = state.get("evaluated", self.steps)
        self.best_step = state.get("best_step")
        self._by_evaluation = self._judged(self.patience.best)


class GracefulInterrupt:
    """Context manager for a training loop: the first Ctrl-C (or SIGTERM) asks, the second stops at once.

        with GracefulInterrupt() as interrupt:
            for step in ...:
                ...
                if interrupt.requested:
                    save(); raise SystemExit(interrupt.exit_code)

    The second signal raises KeyboardInterrupt (checkpoints are atomic, so nothing is lost), a third kills the process.
    In a thread other than the main one Python delivers no signals: `requested` then stays False.
    """

    exit_code = 130
    message = "finishing this step, then saving; Ctrl-C again stops at once, without saving"

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # Not the main thread.
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: installed by C code, which Python can neither name nor restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            for each in self._previous:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.requested = True
        # os.write: a handler may run in the middle of another print, where sys.stderr cannot be entered again.
        # A terminal that has gone away must not cost the checkpoint.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {self.message}\n".encode())


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
