"""Rewards in processes that can be killed: a reward that hangs, dies or raises costs its own sample and nothing else.

The life of a job: one prompt's group is sent to an idle worker as one job. If the answer does not come within the
time limit, or the worker dies, the worker's process group is killed, a fresh one takes its place, and the group's
samples are retried one by one, so that only the guilty one becomes an error.

Workers are fresh interpreters, not forks and not `multiprocessing` children: they never run the main program again
and never import torch, whatever the main program does. Prompts go to them pickled, answers come back as JSON.
When the parent dies, by SIGKILL too, the kernel ends the worker's process group (a signal-driven pipe).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from upslope.errors import ConfigError, DataError, RunError, UpslopeError
from upslope.rollout.in_process import CombinedScorer, Surroundings, load_model_rewards, split_rewards
from upslope.rollout.judge import InlineScorer, RewardSpecs, Scorer, finish, sample_of
from upslope.tasks.base import Task
from upslope.tasks.loading import first_line, parse_rewards
from upslope.tasks.scoring import TIMED_OUT, Sample, build_scoring
from upslope.types import Prompt, Reward, RolloutGroup

START_LIMIT_S = 180.0
# The worker ends awaits at the limit by itself; killing is for what cannot be interrupted.
GRACE_S = 0.5
MAX_IDLE_DEATHS = 5
_BOOT = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from upslope.rollout.workers import serve; serve(setup)"
)
_KINDS: dict[str, type[UpslopeError]] = {"ConfigError": ConfigError, "DataError": DataError}


@dataclass(slots=True)
class _Job:
    """Samples of one prompt to be judged by one call, and where their rewards go."""

    group: int
    places: list[int]
    prompt: Prompt
    samples: list[Sample]

    def singles(self) -> list[_Job]:
        return [
            _Job(self.group, [place], self.prompt, [sample])
            for place, sample in zip(self.places, self.samples, strict=True)
        ]


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: int
    deadline: float
    ready: bool = False
    job: _Job | None = None
    whole_group: bool = False


class RewardPool:
    """Judges groups in `processes` killable worker processes.

    task: the spec of the task (`load_task`). rewards: (spec, weight) pairs or texts such as "length:target=20@0.5"
    that replace the task's own reward; "task" among them stands for it. timeout_s: wall-clock limit of one job (a
    group, or one sample on retry), start-up not counted.

    Use it as a context manager, or call `close`. Workers start at once, in the background. ConfigError, raised by
    the first `judge`: a worker cannot load the task or a reward.
    """

    def __init__(
        self, task: str | None, rewards: RewardSpecs = (), *, processes: int = 1, timeout_s: float = 10.0
    ) -> None:
        if processes < 1:
            raise ConfigError(f"a reward pool needs at least 1 process, got {processes}")
        if not timeout_s > 0:
            raise ConfigError(f"the reward time limit must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._setup = {
            "path": [str(entry) for entry in sys.path],
            "task": task,
            "rewards": parse_rewards(rewards),
            "timeout_s": timeout_s,
        }
        self._directory = os.getcwd()
        self._closed = False
        self._idle_deaths = 0
        self._workers: list[_Worker] = []
        for _ in range(processes):
            self._workers.append(self._start())

    def judge(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Set every rollout's reward, in place; returns `reward/errors`, `reward/timeouts`, `reward/seconds`.

        DataError: a reward function returned the wrong number of judgements or no list, or no rollout at all could
        be judged. ConfigError: task or reward cannot be loaded. RunError: workers die while starting, or are closed.
        """
        if self._closed:
            raise RunError("this reward pool is closed")
        start = time.perf_counter()
        jobs = deque(
            _Job(index, list(range(len(group.rollouts))), group.prompt, [sample_of(r) for r in group.rollouts])
            for index, group in enumerate(groups)
            if group.rollouts
        )
        rewards: dict[tuple[int, int], Reward] = {}
        try:
            self._run(jobs, rewards)
        except BaseException:
            self._drop_busy()
            raise
        for (group, place), reward in rewards.items():
            groups[group].rollouts[place].reward = reward
        return finish(groups, time.perf_counter() - start)

    def close(self) -> None:
        """Kill every worker and what it started. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            _kill(worker)
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _run(self, jobs: deque[_Job], rewards: dict[tuple[int, int], Reward]) -> None:
        while jobs or any(worker.job for worker in self._workers):
            for place, worker in enumerate(self._workers):
                if worker.ready and worker.job is None and jobs:
                    self._send(place, jobs.popleft(), jobs)
            # A worker that is still starting matters only as long as jobs wait for one.
            active = [w for w in self._workers if w.job is not None or (not w.ready and jobs)]
            nearest = min((w.deadline for w in active), default=time.monotonic())
            answered = wait([w.connection for w in active], max(0.0, nearest - time.monotonic()))
            for place, worker in enumerate(list(self._workers)):
                if worker.connection in answered:
                    self._receive(place, jobs, rewards)
                elif worker in active and time.monotonic() > worker.deadline:
                    seconds = self.timeout_s if worker.ready else START_LIMIT_S
                    self._lose(place, f"{TIMED_OUT} after {seconds:g} s", jobs, rewards)

    def _send(self, place: int, job: _Job, jobs: deque[_Job]) -> None:
        worker = self._workers[place]
        if worker.process.poll() is not None:
            self._replace_idle(place, job, jobs)
            return
        try:
            message = pickle.dumps((job.prompt, job.samples))
        except Exception as error:
            raise DataError(
                f"prompt {job.prompt.key} cannot be sent to a reward worker ({type(error).__name__}: "
                f"{first_line(error)}); keep plain values in its metadata"
            ) from error
        worker.job = job
        worker.deadline = time.monotonic() + self.timeout_s + GRACE_S
        try:
            worker.connection.send_bytes(message)
        except OSError:
            self._replace_idle(place, job, jobs)

    def _replace_idle(self, place: int, job: _Job, jobs: deque[_Job]) -> None:
        """A worker that died between jobs (out of memory, say) costs no sample; dying again and again is an error."""
        died = _kill(self._workers[place])
        self._workers[place] = self._start()
        jobs.appendleft(job)
        self._idle_deaths += 1
        if self._idle_deaths >= MAX_IDLE_DEATHS:
            raise RunError(f"reward workers keep dying while idle ({died}); look at what the task file starts")

    def _receive(self, place: int, jobs: deque[_Job], rewards: dict[tuple[int, int], Reward]) -> None:
        worker = self._workers[place]
        try:
            answer = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._lose(place, "", jobs, rewards)
            return
        if "fatal" in answer:
            _kill(worker)
            self._workers[place] = self._start()
            raise _KINDS.get(answer["kind"], RunError)(answer["fatal"])
        if not worker.ready:
            worker.ready, worker.whole_group = True, answer["whole_group"]
            return
        self._idle_deaths = 0
        job, worker.job = worker.job, None
        assert job is not None
        for index, fields in zip(job.places, answer["rewards"], strict=True):
            steps = [(at, step) for at, step in fields.pop("steps")]
            rewards[job.group, index] = Reward(**fields, steps=steps)

    def _lose(self, place: int, reason: str, jobs: deque[_Job], rewards: dict[tuple[int, int], Reward]) -> None:
        """Replace a worker that hangs or died; retry its samples one by one, or mark the one it had."""
        worker = self._workers[place]
        hung = bool(reason)
        died = _kill(worker)
        reason = reason or f"the reward worker died ({died})"
        if not worker.ready:
            self._workers[place] = self._start()
            raise RunError(f"a reward worker did not start: {reason}; run the task file alone to see why")
        self._workers[place] = self._start()
        job = worker.job
        assert job is not None
        if len(job.places) > 1 and not worker.whole_group:
            jobs.extendleft(reversed(job.singles()))
            return
        seconds = self.timeout_s if hung else 0.0
        for index in job.places:
            rewards[job.group, index] = Reward(value=None, error=reason, seconds=seconds)

    def _drop_busy(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker.job is not None or worker.process.poll() is not None:
                _kill(worker)
                self._workers[place] = self._start()

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        # One pipe per worker: whom the kernel signals is a property of the open file, which copies would share.
        watched, held = os.pipe()
        setup = {**self._setup, "connection": theirs.fileno(), "lifeline": watched}
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(setup)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints must not end up in a command's machine-readable output
            pass_fds=(theirs.fileno(), watched),
            start_new_session=True,
            cwd=self._directory,
        )
        theirs.close()
        os.close(watched)
        return _Worker(process, ours, held, time.monotonic() + START_LIMIT_S)


def make_scorer(
    task: Task | str | None,
    rewards: RewardSpecs = (),
    *,
    processes: int = 0,
    timeout_s: float = 10.0,
    surroundings: Surroundings | None = None,
) -> Scorer:
    """The scorer a recipe uses: in this process where processes is 0 and every part is safe there, else a pool.

    Rewards that are networks (MODEL_REWARDS) are added in this process; they need the policy's `surroundings`.
    """
    rewards, networks = split_rewards(rewards)
    if networks:
        if surroundings is None:
            raise ConfigError(f"reward '{networks[0][0]}' is a network and needs a policy to read its tokens from")
        extra = load_model_rewards(networks, surroundings)
        base = make_scorer(task, rewards, processes=processes, timeout_s=timeout_s) if rewards else None
        return CombinedScorer(base, extra)
    if processes == 0 and build_scoring(task, rewards).inline_safe:
        return InlineScorer(task, rewards)
    if isinstance(task, Task) and task.spec is None:
        raise ConfigError(f"task '{task.name}' was made by hand: load it with load_task(spec), so that workers can too")
    spec = task.spec if isinstance(task, Task) else task
    return RewardPool(spec, rewards, processes=max(1, processes), timeout_s=timeout_s)


def _kill(worker: _Worker) -> str:
    """Kill a worker's whole process group; returns how it had ended by itself, if it had."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(0.05)
    code = worker.process.poll()
    # The group outlives its leader while anything the reward started still runs.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    worker.connection.close()
    os.close(worker.lifeline)
    if code is None:
        return "killed"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def serve(setup: dict[str, Any]) -> None:
    """The worker's whole life: load the scoring once, then answer jobs until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent(setup["lifeline"])
    connection = Connection(setup["connection"])
    try:
        scoring = build_scoring(setup["task"], [(spec, weight) for spec, weight in setup["rewards"]])
    except Exception as error:
        _send_fatal(connection, error)
        return
    connection.send_bytes(json.dumps({"whole_group": scoring.whole_group}).encode())
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            prompt, samples = pickle.loads(message)
            rewards = scoring.judge(prompt, samples, timeout_s=setup["timeout_s"])
        except Exception as error:
            _send_fatal(connection, error)
            continue
        connection.send_bytes(json.dumps({"rewards": [asdict(reward) for reward in rewards]}).encode())


def _send_fatal(connection: Connection, error: Exception) -> None:
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "")
    text = first_line(error) if kind else f"a reward worker failed: {type(error).__name__}: {first_line(error)}"
    connection.send_bytes(json.dumps({"fatal": text, "kind": kind}).encode())


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel signal this process group (SIGIO, whose default is to end it) when the parent's end closes."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        if os.read(lifeline, 1) == b"":
            os._exit(0)
