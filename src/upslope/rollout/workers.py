"""Rewards in processes that can be killed: a reward that hangs, dies or raises costs its own sample and nothing else.

The life of a job: one prompt's group is sent to an idle worker as one job with a number of its own. If no whole answer
with that number comes within the time limit, or the worker dies, it is killed with all it started, a fresh one takes
its place, and the group's samples are retried one by one, so that only the guilty one becomes an error.

Workers are fresh interpreters, not forks and not `multiprocessing` children: they never run the main program again
and never import torch, whatever the main program does. Prompts go to them pickled, answers come back as JSON
(channel.py). Each has a keeper (keeper.py) that ends all that it started when the worker or the trainer ends, also by
SIGKILL. What a job leaves without a parent ends with the job; a child that the reward holds may serve the next one.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from upslope.errors import ConfigError, DataError, RunError, UpslopeError
from upslope.plugins import first_line
from upslope.rollout.channel import TOKEN_BYTES, Channel, Garbled, wait
from upslope.rollout.in_process import CombinedScorer, Surroundings, load_model_rewards, split_rewards
from upslope.rollout.judge import InlineScorer, RewardSpecs, Scorer, finish, sample_of
from upslope.rollout.keeper import END_LIMIT_S, children, descendants, end_descendants
from upslope.tasks.base import Task
from upslope.tasks.loading import parse_rewards
from upslope.tasks.scoring import TIMED_OUT, Sample, build_scoring
from upslope.types import Prompt, Reward, RolloutGroup

START_LIMIT_S = 180.0
# The worker ends awaits at the limit by itself; killing is for what cannot be interrupted.
GRACE_S = 0.5
# A worker that closed its end is dead or dying: so long its keeper may take to say how.
DYING_S = 1.0
MAX_IDLE_DEATHS = 5
_GARBLED = "the reward worker's answer was garbled: something in the reward writes into files it did not open"
_BOOT = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from upslope.rollout.keeper import keep; keep(setup)"
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
    """A worker as the trainer sees it. process: its keeper. number: of the answer that is awaited, None for none."""

    process: subprocess.Popen[bytes]
    channel: Channel
    lifeline: int
    deadline: float
    number: int | None = 0
    ready: bool = False
    pid: int = 0
    job: _Job | None = None
    whole_group: bool = False
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
        self._owner = os.getpid()
        self._numbers = itertools.count(1)
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
        if os.getpid() != self._owner:
            raise RunError("this reward pool belongs to the process that made it; make one after the fork")
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
        """Kill every worker and what it started. Safe to call twice, and in a fork, where it does nothing."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        for worker in self._workers:
            worker.order_end()
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            answered = wait([w.channel for w in active], nearest - time.monotonic())
            for place, worker in enumerate(list(self._workers)):
                if worker.channel in answered:
                    self._receive(place, jobs, rewards)
                pending = self._workers[place] is worker and worker in active and worker.number is not None
                if pending and time.monotonic() > worker.deadline:
                    seconds = self.timeout_s if worker.ready else START_LIMIT_S
                    self._lose(place, f"{TIMED_OUT} after {seconds:g} s", jobs, rewards)

    def _send(self, place: int, job: _Job, jobs: deque[_Job]) -> None:
        worker = self._workers[place]
        if worker.channel.unread or wait([worker.channel], 0):  # nothing was asked: rubbish, or its end
            self._replace_idle(place, job, jobs)
            return
        try:
            message = pickle.dumps((job.prompt, job.samples))
        except Exception as error:
            raise DataError(
                f"prompt {job.prompt.key} cannot be sent to a reward worker ({type(error).__name__}: "
                f"{first_line(error)}); keep plain values in its metadata"
            ) from error
        worker.job, worker.number = job, next(self._numbers)
        worker.deadline = time.monotonic() + self.timeout_s + GRACE_S
        worker.channel.put(worker.number, message)

    def _replace_idle(self, place: int, job: _Job, jobs: deque[_Job]) -> None:
        """A worker that broke between jobs (out of memory, say) costs no sample; one after the other is an error."""
        died = self._replace(place, DYING_S)
        jobs.appendleft(job)
        self._idle_deaths += 1
        if self._idle_deaths >= MAX_IDLE_DEATHS:
            raise RunError(f"reward workers keep breaking while idle ({died}); look at what the task file starts")

    def _receive(self, place: int, jobs: deque[_Job], rewards: dict[tuple[int, int], Reward]) -> None:
        worker = self._workers[place]
        try:
            worker.channel.fill()
            while (message := worker.channel.take()) is not None and message[0] != worker.number:
                pass
        except Garbled:
            self._lose(place, _GARBLED, jobs, rewards)
            return
        except (EOFError, OSError):
            self._lose(place, "", jobs, rewards)
            return
        if message is not None:
            worker.number = None
            self._accept(place, json.loads(message[1]), rewards)

    def _accept(self, place: int, answer: dict[str, Any], rewards: dict[tuple[int, int], Reward]) -> None:
        worker = self._workers[place]
        if "fatal" in answer:
            self._replace(place)
            raise _KINDS.get(answer["kind"], RunError)(answer["fatal"])
        if not worker.ready:
            worker.ready, worker.pid, worker.whole_group = True, answer["pid"], answer["whole_group"]
            worker.spared = frozenset({worker.pid, *descendants(worker.process.pid)})
            return
        self._idle_deaths = 0
        job, worker.job = worker.job, None
        assert job is not None
        for index, fields in zip(job.places, answer["rewards"], strict=True):
            steps = [(at, step) for at, step in fields.pop("steps")]
            rewards[job.group, index] = Reward(**fields, steps=steps)
        if any(TIMED_OUT in (fields["error"] or "") for fields in answer["rewards"]) and children(worker.pid):
            self._replace(place)  # an await that was ended, not so what it had started
        else:
            worker.end_strays()

    def _lose(self, place: int, reason: str, jobs: deque[_Job], rewards: dict[tuple[int, int], Reward]) -> None:
        """Replace a worker that hangs or died; retry its samples one by one, or mark the one it had."""
        worker = self._workers[place]
        died = self._replace(place, 0.0 if reason else DYING_S)
        reason = reason or f"the reward worker died ({died})"
        if not worker.ready:
            raise RunError(f"a reward worker did not start: {reason}; run the task file alone to see why")
        job = worker.job
        assert job is not None
        if len(job.places) > 1 and not worker.whole_group:
            jobs.extendleft(reversed(job.singles()))
            return
        seconds = self.timeout_s if reason.startswith(TIMED_OUT) else 0.0
        for index in job.places:
            rewards[job.group, index] = Reward(value=None, error=reason, seconds=seconds)

    def _drop_busy(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker.job is not None or worker.process.poll() is not None:
                self._replace(place)

    def _replace(self, place: int, patience: float = 0.0) -> str:
        died = self._workers[place].end(patience)
        self._workers[place] = self._start()
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
) -> Scorer:
    """The scorer a recipe uses: in this process where processes is 0 and every part is safe there, else a pool.

    A task made by hand and rewards that are functions are used in this process, without a time limit.

    Rewards that are networks (MODEL_REWARDS) are added in this process; they need the policy's `surroundings`.
    """
    rewards, networks = split_rewards(rewards)
    if networks:
        if surroundings is None:
            raise ConfigError(f"reward '{networks[0][0]}' is a network and needs a policy to read its tokens from")
        extra = load_model_rewards(networks, surroundings)
        base = make_scorer(task, rewards, processes=processes, timeout_s=timeout_s) if rewards else None
        return CombinedScorer(base, extra)
    objects = [spec for spec, _ in rewards if not isinstance(spec, str)]
    objects += [task] if isinstance(task, Task) and task.spec is None else []
    if processes == 0 and (objects or build_scoring(task, rewards).inline_safe):
        return InlineScorer(task, rewards)
    if objects:
        raise ConfigError(f"{objects[0]!r:.80} is an object of this process, where a reward worker has none: name it")
    spec = task.spec if isinstance(task, Task) else task
    return RewardPool(spec, rewards, processes=max(1, processes), timeout_s=timeout_s)


def serve(setup: dict[str, Any]) -> None:
    """The worker's whole life: load the scoring once, then answer jobs until the parent closes its end."""
    end = socket.socket(fileno=setup["connection"])
    end.set_inheritable(False)
    channel = Channel(end, bytes.fromhex(setup["token"]))
    os.register_at_fork(after_in_child=channel.close)  # what a reward forks cannot answer
    try:
        scoring = build_scoring(setup["task"], [(spec, weight) for spec, weight in setup["rewards"]])
    except Exception as error:
        channel.send(0, _fatal(error))
        return
    channel.send(0, {"pid": os.getpid(), "whole_group": scoring.whole_group})
    while (asked := channel.receive()) is not None:
        number, message = asked
        try:
            prompt, samples = pickle.loads(message)
            rewards = scoring.judge(prompt, samples, timeout_s=setup["timeout_s"])
        except Exception as error:
            channel.send(number, _fatal(error))
        else:
            channel.send(number, {"rewards": [asdict(reward) for reward in rewards]})


def _fatal(error: Exception) -> dict[str, str]:
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "")
    text = first_line(error) if kind else f"a reward worker failed: {type(error).__name__}: {first_line(error)}"
    return {"fatal": text, "kind": kind}
