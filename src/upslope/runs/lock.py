"""One writer per run folder.

A POSIX record lock on the file `.lock`: the kernel drops it when its process ends, however it ends, so a lock can
never be stale; and forked workers do not inherit it, so an orphan cannot keep a run locked. The file's content
(process id, host, start) only serves the messages.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from upslope.atomic import saving
from upslope.errors import RunError

LOCK_NAME = ".lock"
_BUSY = {errno.EACCES, errno.EAGAIN}
# Record locks belong to the process: a second one in the same process would be granted, and closing any descriptor of
# the file would drop the first. Hence this table of (process, device, inode).
_HELD: dict[tuple[int, int, int], dict[str, Any]] = {}


class FolderLock:
    """The exclusive right to write a run folder, from construction until `release` or the end of the process.

    Raises:
        RunError: another process (named by its id), or this one, already writes the run.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_NAME
        with saving(path, "lock the run"):
            owner = _held_here(path)
            if owner is not None:
                raise RunError(f"{folder}: this process already has the run open for writing; close it first")
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._acquire(folder)
                self._key = _key(os.fstat(self._descriptor))
                _HELD[self._key] = self._sign()
            except BaseException:
                os.close(self._descriptor)
                raise

    def _acquire(self, folder: Path) -> None:
        for attempt in range(10):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in _BUSY:
                    raise
            if attempt < 9:
                time.sleep(0.05)  # A viewer that asks `writer_of` holds the lock for a moment.
        owner = _read_owner(self._descriptor)
        raise RunError(
            f"{folder}: process {owner.get('pid', '?')} on {owner.get('host', '?')} is writing this run; "
            "wait until it ends, stop it, or choose another --output-dir"
        )

    def _sign(self) -> dict[str, Any]:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)
        return owner

    def release(self) -> None:
        """Gives the lock back; may be called twice."""
        if self._descriptor >= 0:
            _HELD.pop(self._key, None)
            os.close(self._descriptor)
            self._descriptor = -1


def writer_of(folder: Path) -> dict[str, Any] | None:
    """Who writes the run right now ({"pid", "host", "started"}), or None when nobody does."""
    path = folder / LOCK_NAME
    with saving(path, "read the lock"):
        try:
            owner = _held_here(path)
            if owner is not None:
                return dict(owner)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            return _read_owner(descriptor)
        else:
            return None
        finally:
            os.close(descriptor)


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino


def _held_here(path: Path) -> dict[str, Any] | None:
    try:
        return _HELD.get(_key(os.stat(path)))
    except FileNotFoundError:
        return None


def _read_owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
