"""A pool of processes that can be killed: what hangs, dies or raises in one costs its own job and nothing else.

The life of a job: it is sent to an idle worker with a number of its own. If no whole answer with that number comes
within the time limit, or the worker dies, it is killed with all it started, a fresh one takes its place, and the parts
of the job are tried one by one; a job without parts has failed.

Workers are fresh interpreters, not forks and not `multiprocessing` children: they never run the main program again
and never import torch, whatever the main program does. Jobs go to them pickled, answers come back as JSON
(channel.py). Each has a keeper (keeper.py) that ends all that it started when the worker or the trainer ends, also by
SIGKILL. What a job leaves without a parent ends with the job; a child that the worker holds may serve the next one.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import pickle
import secrets
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from upslope.errors import ConfigError, DataError, RunError, UpslopeError
from upslope.plugins import TIMED_OUT, first_line
from upslope.workers.process import (
    END_LIMIT_S,
    TOKEN_BYTES,
    Channel,
    Garbled,
    children,
    descendants,
    end_descendants,
    wait,
)

START_LIMIT_S = 180.0
# The worker ends awaits at the limit by itself; killing is for what cannot be interrupted.
GRACE_S = 0.5
# A worker that closed its end is dead or dying: so long its keeper may take to say how.
DYING_S = 1.0
MAX_IDLE_DEATHS = 5
_GARBLED = "the reward worker's answer was garbled: something in the reward writes into files it did not open"
_BOOT = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from upslope.workers.process import keep; keep(setup); from upslope.workers.pool import serve; serve(setup)"
)
_KINDS: dict[str, type[UpslopeError]] = {"ConfigError": ConfigError, "DataError": DataError}


class Job(Protocol):
    """What a worker is asked by one call, and where its answer goes."""

    def message(self) -> bytes:
        """The arguments of the worker's function, pickled."""
        ...

    def answered(self, answer: Mapping[str, Any]) -> bool:
        """Take the answer; whether the worker ended a part of the work by the clock."""
        ...

    def failed(self, reason: str, seconds: float) -> None:
        """Note that there will be no answer."""
        ...

    def parts(self, ready: Mapping[str, Any]) -> Sequence[Job]:
        """What to try one by one after a loss; none where the job cannot be divided. ready: what the worker said."""
        ...


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as the trainer sees it.

    process: its keeper. number: of the answer that is awaited, None for none. ready: what it said once it could work.
    """

    process: subprocess.Popen[bytes]
    channel: Channel
    lifeline: int
    deadline: float
    number: int | None = 0
    ready: Mapping[str, Any] = field(default_factory=dict)
    job: Job | None = None
    spared: frozenset[int] = frozenset()

    def end(self, patience: float = 0.0) -> str:
        """End it with all it started; returns how it had ended by itself within `patience` seconds, if it had."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        code = self.process.poll()
        self.order_end()
        try:
            self.process.wait(END_LIMIT_S + DYING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
        if code is None:
            return "killed"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def order_end(self) -> None:
        """Tell the keeper, without waiting; by a byte too, as a fork of this process may hold the pipe open."""
        if self.lifeline >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self.lifeline, b".")
            os.close(self.lifeline)
            self.lifeline = -1

    def end_strays(self) -> None:
        """End what the last job left behind without a parent; what was there before the first job stays."""
        if children(self.process.pid) - self.spared:
            end_descendants(self.process.pid, self.spared)


class Pool(AbstractContextManager[Any]):
    """`processes` killable worker processes.

    start: "module:function" that a worker calls with `setup` (what JSON holds, and timeout_s) for the function that
    answers, and what it says of itself when it is ready. timeout_s: wall-clock limit of one job, start-up not counted.

    Use it as a context manager, or call `close`. Workers start at once, in the background.
    """

    def __init__(self, start: str, setup: Mapping[str, Any], *, processes: int, timeout_s: float) -> None:
        if processes < 1:
            raise ConfigError(f"a reward pool needs at least 1 process, got {processes}")
        if not timeout_s > 0:
            raise ConfigError(f"the reward time limit must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._setup = {**setup, "path": [str(entry) for entry in sys.path], "timeout_s": timeout_s, "start": start}
        self._directory = os.getcwd()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
        self._closed = False
        self._idle_deaths = 0
        self._jobs: deque[Job] = deque()
        self._workers: list[_Worker] = []
        for _ in range(processes):
            self._workers.append(self._start())

    def run(self, jobs: Iterable[Job]) -> None:
        """Have every job answered, or failed where it hangs or kills its worker.

        ConfigError, DataError: what a worker could not go on after, as it said it. RunError: workers die while
        starting or between jobs, or are closed.
        """
        if self._closed:
            raise RunError("this reward pool is closed")
        if os.getpid() != self._owner:
            raise RunError("this reward pool belongs to the process that made it; make one after the fork")
        self._jobs = deque(jobs)
        try:
            while self._jobs or any(worker.job for worker in self._workers):
                self._turn()
        except BaseException:
            for worker in list(self._workers):
                if worker.job is not None or worker.process.poll() is not None:
                    self._replace(worker)
            raise

    def close(self) -> None:
        """Kill every worker and what it started. Safe to call twice, and in a fork, where it does nothing."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for worker in self._workers:
            worker.order_end()
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _turn(self) -> None:
        """Give idle workers jobs, wait for the next answer or deadline, and take what came."""
        for worker in list(self._workers):
            if worker.ready and worker.job is None and self._jobs:
                self._send(worker, self._jobs.popleft())
        # A worker that is still starting matters only as long as jobs wait for one.
        active = [w for w in self._workers if w.job is not None or (not w.ready and self._jobs)]
        nearest = min((w.deadline for w in active), default=time.monotonic())
        answered = wait([w.channel for w in active], nearest - time.monotonic())
        for worker in active:
            if worker.channel in answered:
                self._receive(worker)
            pending = worker in self._workers and worker.number is not None
            if pending and time.monotonic() > worker.deadline:
                self._lose(worker, f"{TIMED_OUT} after {self.timeout_s if worker.ready else START_LIMIT_S:g} s")

    def _send(self, worker: _Worker, job: Job) -> None:
        if worker.channel.unread or wait([worker.channel], 0):
            # Nothing was asked: rubbish, or its end. What broke between jobs (out of memory, say) costs nothing; one
            # after the other is an error.
            died = self._replace(worker, DYING_S)
            self._jobs.appendleft(job)
            self._idle_deaths += 1
            if self._idle_deaths >= MAX_IDLE_DEATHS:
                raise RunError(f"reward workers keep breaking while idle ({died}); look at what the task file starts")
            return
        message = job.message()
        worker.job, worker.number = job, next(self._numbers)
        worker.deadline = time.monotonic() + self.timeout_s + GRACE_S
        worker.channel.put(worker.number, message)

    def _receive(self, worker: _Worker) -> None:
        try:
            worker.channel.fill()
            while (message := worker.channel.take()) is not None and message[0] != worker.number:
                pass
        except Garbled:
            self._lose(worker, _GARBLED)
        except (EOFError, OSError):
            self._lose(worker, "")
        else:
            if message is not None:
                worker.number = None
                self._accept(worker, json.loads(message[1]))

    def _accept(self, worker: _Worker, answer: Mapping[str, Any]) -> None:
        if "fatal" in answer:
            self._replace(worker)
            raise _KINDS.get(answer["kind"], RunError)(answer["fatal"])
        if not worker.ready:
            worker.ready = answer
            worker.spared = frozenset({answer["pid"], *descendants(worker.process.pid)})
            return
        self._idle_deaths = 0
        job, worker.job = worker.job, None
        assert job is not None
        if job.answered(answer) and children(worker.ready["pid"]):
            self._replace(worker)  # an await that was ended, not so what it had started
        else:
            worker.end_strays()

    def _lose(self, worker: _Worker, reason: str) -> None:
        """Replace a worker that hangs or died; try the parts of its job one by one, or fail what has none."""
        died = self._replace(worker, 0.0 if reason else DYING_S)
        reason = reason or f"the reward worker died ({died})"
        if not worker.ready:
            raise RunError(f"a reward worker did not start: {reason}; run the task file alone to see why")
        assert worker.job is not None
        if parts := worker.job.parts(worker.ready):
            self._jobs.extendleft(reversed(parts))
        else:
            worker.job.failed(reason, self.timeout_s if reason.startswith(TIMED_OUT) else 0.0)

    def _replace(self, worker: _Worker, patience: float = 0.0) -> str:
        died = worker.end(patience)
        self._workers[self._workers.index(worker)] = self._start()
        return died

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        token = secrets.token_bytes(TOKEN_BYTES)
        watched, held = os.pipe()
        ends = {"connection": theirs.fileno(), "lifeline": watched, "token": token.hex(), "trainer": self._owner}
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps({**self._setup, **ends})],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints must not end up in a command's machine-readable output
            pass_fds=(theirs.fileno(), watched),
            start_new_session=True,
            cwd=self._directory,
        )
        theirs.close()
        os.close(watched)
        return _Worker(process, Channel(ours, token), held, time.monotonic() + START_LIMIT_S)


def serve(setup: dict[str, Any]) -> None:
    """The worker's whole life: load once what answers, then answer jobs until the parent closes its end."""
    end = socket.socket(fileno=setup["connection"])
    end.set_inheritable(False)
    channel = Channel(end, bytes.fromhex(setup["token"]))
    os.register_at_fork(after_in_child=channel.close)  # what a job forks cannot answer
    module, _, name = setup["start"].partition(":")
    start = getattr(importlib.import_module(module), name)
    try:
        answer, ready = start(setup)
    except Exception as error:
        channel.send(0, _fatal(error))
        return
    channel.send(0, {"pid": os.getpid(), **ready})
    while (asked := channel.receive()) is not None:
        number, message = asked
        try:
            found = answer(*pickle.loads(message))
        except Exception as error:
            found = _fatal(error)
        channel.send(number, found)


def _fatal(error: Exception) -> dict[str, str]:
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "")
    text = first_line(error) if kind else f"a reward worker failed: {type(error).__name__}: {first_line(error)}"
    return {"fatal": text, "kind": kind}
