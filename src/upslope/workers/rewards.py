"""Rewards in processes that can be killed: a reward that hangs, dies or raises costs its own sample and nothing else.

A job is one prompt's group. It is sent to an idle worker with a number of its own. If no whole answer with that number
comes within the time limit, or the worker dies, it is killed with all it started, a fresh one takes its place, and the
group's samples are tried one by one, so that only the guilty one becomes an error.

Workers are fresh interpreters, not forks and not `multiprocessing` children: they never run the main program again
and never import torch, whatever the main program does. Jobs go to them pickled, answers come back as JSON. Each has a
keeper that ends all that it started when the worker or the trainer ends, also by SIGKILL (process.py). What a job
leaves without a parent ends with the job; a child that the worker holds may serve the next one.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from upslope.errors import ConfigError, DataError, RunError
from upslope.plugins import TIMED_OUT, first_line
from upslope.rewards.judge import InlineJudge, Judge, WeightedSum
from upslope.rewards.summands import (
    RewardSpecs,
    Sample,
    Summand,
    Surroundings,
    load_networks,
    parse_rewards,
    split_rewards,
)
from upslope.tasks.base import Task, load_task
from upslope.types import Prompt, Reward, Rollout, RolloutGroup
from upslope.workers.process import (
    END_LIMIT_S,
    KINDS,
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
    "from upslope.workers.process import keep, serve; keep(setup); serve(setup)"
)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rollouts of one prompt to be judged by one call, and where what is said of them goes."""

    prompt: Prompt
    rollouts: list[Rollout]
    judged: list[tuple[Rollout, Reward]]

    def message(self) -> bytes:
        """The arguments of the worker's `WeightedSum.judge`, pickled."""
        try:
            return pickle.dumps((self.prompt, [Sample.of(rollout) for rollout in self.rollouts]))
        except Exception as error:
            raise DataError(
                f"prompt {self.prompt.key} cannot be sent to a reward worker ({type(error).__name__}: "
                f"{first_line(error)}); keep plain values in its metadata"
            ) from error

    def answered(self, answer: Mapping[str, Any]) -> bool:
        """Take the answer; whether the worker ended a part of the work by the clock."""
        for rollout, fields in zip(self.rollouts, answer["rewards"], strict=True):
            steps = [(at, step) for at, step in fields.pop("steps")]
            self.judged.append((rollout, Reward(**fields, steps=steps)))
        return any(TIMED_OUT in (fields["error"] or "") for fields in answer["rewards"])

    def failed(self, reason: str, seconds: float) -> None:
        """Note that there will be no answer."""
        self.judged.extend((rollout, Reward(value=None, error=reason, seconds=seconds)) for rollout in self.rollouts)

    def parts(self, ready: Mapping[str, Any]) -> list[_Group]:
        """What to try one by one after a loss; none where the job cannot be divided. ready: what the worker said."""
        single = len(self.rollouts) == 1 or ready["whole_group"]
        return [] if single else [replace(self, rollouts=[rollout]) for rollout in self.rollouts]


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
    job: _Group | None = None
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
        return "killed" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    def order_end(self) -> None:
        """Tell the keeper, without waiting; by a byte too, as a fork of this process may hold the pipe open."""
        if self.lifeline >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self.lifeline, b".")
            os.close(self.lifeline)
            self.lifeline = -1


class RewardPool(Judge):
    """Judges groups in `processes` killable worker processes.

    task: the spec of the task (`load_task`). rewards: (spec, weight) pairs or texts such as "length:target=20@0.5"
    that replace the task's own reward; "task" among them stands for it. timeout_s: wall-clock limit of one job (a
    group, or one sample on retry), start-up not counted. networks: what is added in this process.

    Use it as a context manager, or call `close`. Workers start at once, in the background. ConfigError, raised by
    the first `judge`: a worker cannot load the task or a reward. RunError: workers die while starting, or are closed.
    """

    def __init__(
        self,
        task: str | None,
        rewards: RewardSpecs = (),
        *,
        processes: int = 1,
        timeout_s: float = 10.0,
        networks: Sequence[Summand] = (),
    ) -> None:
        wanted = parse_rewards(rewards)
        if processes < 1:
            raise ConfigError(f"a reward pool needs at least 1 process, got {processes}")
        if not timeout_s > 0:
            raise ConfigError(f"the reward time limit must be positive, got {timeout_s}")
        self.timeout_s, self.networks = timeout_s, networks
        path = [str(entry) for entry in sys.path]
        self._setup = {"task": task, "rewards": wanted, "path": path, "timeout_s": timeout_s}
        self._directory = os.getcwd()
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
        self._closed = False
        self._idle_deaths = 0
        self._jobs: deque[_Group] = deque()
        self._workers: list[_Worker] = []
        for _ in range(processes):
            self._workers.append(self._start())

    def fill(self, groups: Sequence[RolloutGroup]) -> None:
        """Set every rollout's reward by the functions, once all are judged.

        ConfigError, DataError: what a worker could not go on after, as it said it. RunError: workers die while
        starting or between jobs, or are closed.
        """
        if self._closed:
            raise RunError("this reward pool is closed")
        if os.getpid() != self._owner:
            raise RunError("this reward pool belongs to the process that made it; make one after the fork")
        judged: list[tuple[Rollout, Reward]] = []
        self._jobs = deque(_Group(group.prompt, group.rollouts, judged) for group in groups if group.rollouts)
        try:
            while self._jobs or any(worker.job for worker in self._workers):
                self._turn()
        except BaseException:
            for worker in list(self._workers):
                if worker.job is not None or worker.process.poll() is not None:
                    self._replace(worker)
            raise
        for rollout, reward in judged:
            rollout.reward = reward

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

    def _send(self, worker: _Worker, job: _Group) -> None:
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
            raise KINDS.get(answer["kind"], RunError)(answer["fatal"])
        if not worker.ready:
            worker.ready = answer
            worker.spared = frozenset({answer["pid"], *descendants(worker.process.pid)})
            return
        self._idle_deaths = 0
        job, worker.job = worker.job, None
        assert job is not None
        if job.answered(answer) and children(worker.ready["pid"]):
            self._replace(worker)  # an await that was ended, not so what it had started
        elif children(worker.process.pid) - worker.spared:  # what was there before the first job stays
            end_descendants(worker.process.pid, worker.spared)

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


def make_scorer(
    task: Task | str | None,
    rewards: RewardSpecs = (),
    *,
    processes: int = 0,
    timeout_s: float = 10.0,
    surroundings: Surroundings | None = None,
) -> Judge:
    """The judge a recipe uses: in this process where processes is 0 and every part is safe there, else a pool.

    A task made by hand and rewards that are functions are used in this process, without a time limit.

    Rewards that are networks (NETWORKS) are added in this process; they need the policy's `surroundings`.
    """
    plain, specs = split_rewards(rewards)
    if specs and surroundings is None:
        raise ConfigError(f"reward '{specs[0][0]}' is a network and needs a policy to read its tokens from")
    networks = load_networks(specs, surroundings) if surroundings is not None else []
    if networks and not plain:
        return InlineJudge(None, networks)
    objects = [spec for spec, _ in plain if not isinstance(spec, str)]
    objects += [task] if isinstance(task, Task) and task.spec is None else []
    if processes == 0:
        total = WeightedSum(load_task(task) if isinstance(task, str) else task, plain)
        if objects or total.inline_safe:
            return InlineJudge(total, networks)
    if objects:
        raise ConfigError(f"{objects[0]!r:.80} is an object of this process, where a reward worker has none: name it")
    spec = task.spec if isinstance(task, Task) else task
    return RewardPool(spec, plain, processes=max(1, processes), timeout_s=timeout_s, networks=networks)
