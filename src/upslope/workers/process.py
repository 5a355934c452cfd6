"""What a worker hangs on: the keeper that starts and ends it, and the channel through which it is asked and answers.

The keeper of a worker: a small process that starts it and ends everything it started.

What a job daemonises leaves its session and its parent, so neither a process group nor the worker can find it
again. On Linux an orphan goes to its nearest subreaper; the keeper is that, and outlives the worker. Not the worker
itself, which is what gets killed, and not the trainer, whose other libraries have children of their own.

The trainer holds the keeper's lifeline, a pipe: a byte in it, or its end when the trainer dies, ends all. Elsewhere
than on Linux there are neither subreapers nor /proc: there, only the worker's process group is found.

Imported by a fresh interpreter before anything else: what judges is imported by `serve`, after the fork.

Numbered messages between the trainer and a worker: each arrives whole and unharmed, or as an error.

A user's code shares the worker's process and may write into any open file. So a message begins with a word that only
the two ends know and ends where its header says, with a checksum: rubbish on the way is found, never taken for an
answer. No call waits for the rest of a message unless the socket is made to block.
"""

import contextlib
import ctypes
import json
import os
import pickle
import resource
import select
import selectors
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upslope.errors import ConfigError, DataError, UpslopeError
from upslope.plugins import first_line

KINDS: dict[str, type[UpslopeError]] = {"ConfigError": ConfigError, "DataError": DataError}
END_LIMIT_S = 5.0
# How often the keeper looks whether its parent still is the trainer: a fork of the trainer may hold the lifeline too.
_LOOK_S = 0.5
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SEES_PROCESSES = sys.platform == "linux" and Path("/proc/self/stat").exists()


def keep(setup: dict[str, Any]) -> None:
    """The keeper's whole life; returns in its child, the worker, which serves then (`serve`).

    setup: lifeline and connection (file descriptors), trainer (a pid), and what the worker needs. The keeper ends as
    its worker has ended: with its exit code or by its signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.close(setup["lifeline"])
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            sys.exit()
        return
    os.close(setup["connection"])
    status = _watch(worker, setup["lifeline"], setup["trainer"])
    if _SEES_PROCESSES:
        end_descendants(keeper)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status or 0)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with contextlib.suppress(OSError):  # SIGKILL needs no default
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def children(process: int) -> set[int]:
    """The processes whose parent it is; none where that cannot be seen."""
    try:
        lists = [Path(f"/proc/{process}/task/{name}/children") for name in os.listdir(f"/proc/{process}/task")]
        return {int(pid) for children in lists for pid in children.read_text().split()}
    except OSError:  # an older kernel, or it has just ended
        return {pid for pid, parent in _parents().items() if parent == process}


def end_descendants(process: int, spared: frozenset[int] = frozenset()) -> None:
    """Kill what descends from a process, but for its children `spared` and theirs, until nothing is left of it.

    Gives up after END_LIMIT_S on what cannot be killed (in the kernel, or of another user).
    """
    deadline = time.monotonic() + END_LIMIT_S
    while (found := descendants(process, spared)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def descendants(process: int, spared: frozenset[int] = frozenset()) -> list[int]:
    """What lives and descends from a process, but for its children `spared` and theirs; none where that is not seen."""
    below: dict[int, list[int]] = {}
    for pid, parent in _parents().items():
        below.setdefault(parent, []).append(pid)
    found = [pid for pid in below.get(process, ()) if pid not in spared]
    for pid in found:
        found += below.get(pid, ())
    return found


def _parents() -> dict[int, int]:
    """The parent of every living process (a zombie is not one)."""
    parents = {}
    for name in os.listdir("/proc") if _SEES_PROCESSES else ():
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(name)] = int(parent)
    return parents


def _watch(worker: int, lifeline: int, trainer: int) -> int | None:
    """Wait for an end: the worker's (its status), the trainer's, or the one that is ordered (None)."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while os.getppid() == trainer:
        if (status := _reap(worker)) is not None:
            return status
        ready = [file for file, _ in poll.poll(_LOOK_S * 1000)]
        if lifeline in ready or (woken in ready and set(os.read(woken, 512)) - {signal.SIGCHLD}):
            return _reap(worker)
    return None


def _reap(worker: int) -> int | None:
    """Bury what has ended; the worker's status if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            status = ended[1] if ended[0] == worker else status
    return status


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux" and ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        print(f"prctl({option}) is refused here: what a reward daemonises may outlive the run", file=sys.stderr)


TOKEN_BYTES = 16
_HEAD = struct.Struct(f"!{TOKEN_BYTES}sQQI")  # token, number of the job, bytes that follow, checksum of both
_CHUNK = 1 << 20


class Garbled(Exception):
    """Bytes arrived that the other end did not send as a message."""


class Channel:
    """One end of a socket pair. token: TOKEN_BYTES random bytes, the same at both ends.

    unread: what arrived after the last message taken. unsent: what has not left yet.
    """

    def __init__(self, end: socket.socket, token: bytes) -> None:
        self._end, self._token = end, token
        self.unread, self.unsent = bytearray(), b""

    def fileno(self) -> int:
        """The socket's, for selectors."""
        return self._end.fileno()

    def put(self, number: int, message: bytes) -> None:
        """Queue a message; `flush` sends it."""
        self.unsent += _HEAD.pack(self._token, number, len(message), _checksum(number, message)) + message

    def flush(self) -> None:
        """Send as much as the socket takes now. OSError: the other end is gone."""
        try:
            self.unsent = self.unsent[self._end.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self.unsent = b""
            raise

    def fill(self) -> None:
        """Read what has arrived. EOFError or OSError: nothing more will."""
        try:
            chunk = self._end.recv(_CHUNK)
        except BlockingIOError:
            return
        if not chunk:
            raise EOFError
        self.unread += chunk

    def take(self) -> tuple[int, bytes] | None:
        """The next whole message with its number, None while there is none. Garbled: what arrived is no message."""
        if not self._token.startswith(self.unread[:TOKEN_BYTES]):
            raise Garbled
        if len(self.unread) < _HEAD.size:
            return None
        _, number, length, checksum = _HEAD.unpack_from(self.unread)
        end = _HEAD.size + length
        if len(self.unread) < end:
            return None
        message = bytes(self.unread[_HEAD.size : end])
        if _checksum(number, message) != checksum:
            raise Garbled
        del self.unread[:end]
        return number, message

    def send(self, number: int, answer: dict[str, Any]) -> None:
        """The worker's side: one answer, sent whole."""
        self.put(number, json.dumps(answer).encode())
        while self.unsent:
            self.flush()

    def receive(self) -> tuple[int, bytes] | None:
        """The worker's side: the next job, however long it takes; None when there will be no more."""
        while (message := self.take()) is None:
            try:
                self.fill()
            except (EOFError, OSError):
                return None
        return message

    def close(self) -> None:
        """Close this process's end."""
        self._end.close()


def _checksum(number: int, message: bytes) -> int:
    return zlib.crc32(message, zlib.crc32(number.to_bytes(8, "big")))


def wait(channels: Iterable[Channel], seconds: float) -> list[Channel]:
    """Those that can be read, after `seconds` at most; what is unsent goes out meanwhile."""
    with selectors.DefaultSelector() as selector:
        for channel in channels:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.unsent else 0)
            selector.register(channel, events, channel)
        ready = selector.select(max(0.0, seconds))
    for key, events in ready:
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(OSError):  # an end that is gone can be read: it says so
                key.data.flush()
    return [key.data for key, events in ready if events & selectors.EVENT_READ]


def serve(setup: dict[str, Any]) -> None:
    """The worker's whole life: load once what judges, then answer jobs until the parent closes its end."""
    from upslope.rewards.judge import WeightedSum
    from upslope.tasks.base import load_task

    end = socket.socket(fileno=setup["connection"])
    end.set_inheritable(False)
    channel = Channel(end, bytes.fromhex(setup["token"]))
    os.register_at_fork(after_in_child=channel.close)  # what a job forks cannot answer
    try:
        task = None if setup["task"] is None else load_task(setup["task"])
        total = WeightedSum(task, [(spec, weight) for spec, weight in setup["rewards"]])
    except Exception as error:
        channel.send(0, _fatal(error))
        return
    channel.send(0, {"pid": os.getpid(), "whole_group": total.whole_group})
    while (asked := channel.receive()) is not None:
        number, message = asked
        try:
            rewards = total.judge(*pickle.loads(message), timeout_s=setup["timeout_s"])
            found: dict[str, Any] = {"rewards": [asdict(reward) for reward in rewards]}
        except Exception as error:
            found = _fatal(error)
        channel.send(number, found)


def _fatal(error: Exception) -> dict[str, str]:
    kind = next((name for name, cls in KINDS.items() if isinstance(error, cls)), "")
    text = first_line(error) if kind else f"a reward worker failed: {type(error).__name__}: {first_line(error)}"
    return {"fatal": text, "kind": kind}
