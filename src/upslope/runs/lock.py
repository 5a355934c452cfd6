"""One writer per run folder.

Two locks that the kernel drops when their process ends, however it ends, so that they can never be stale: a POSIX
record lock on the file `.lock`, which also works between machines, and one on the folder itself (flock), which outlives
that file's removal; some network filesystems lack the second. Forked workers hold neither, so that an orphan cannot
keep a run locked. The file's content (process id, host, start) serves the messages, and tells a folder that a kill left
half made from one of the user's.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from upslope.atomic import open_own, saving
from upslope.errors import RunError

LOCK_NAME = ".lock"
_BUSY = {errno.EACCES, errno.EAGAIN}
_NO_FOLDER_LOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Record locks belong to the process: a second one in the same process would be granted, and closing any descriptor of
# the file would drop the first. Hence this table by the folder's (device, inode).
_HELD: dict[tuple[int, int], FolderLock] = {}


class FolderLock:
    """The exclusive right to write a run folder, from construction until `release` or the end of the process.

    Raises:
        RunError: another process (named by its id), or this one, already writes the run; `.lock` is no plain file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self.owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        with saving(self._path, "lock the run"):
            self._key = _key(folder)
            if self._key in _HELD:
                raise RunError(f"{folder}: this process already has the run open for writing; close it first")
            self._folder, self._file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), -1
            try:
                self._acquire()
            except BaseException:
                self._close()
                raise
            _HELD[self._key] = self

    def _acquire(self) -> None:
        for attempt in range(10):
            if attempt:
                time.sleep(0.05)  # A viewer that asks `writer_of` holds the lock for a moment.
            if granted(fcntl.flock, self._folder, fcntl.LOCK_EX, unknown=_NO_FOLDER_LOCK) and self._lock_file():
                return
        owner = owner_of(self._path.parent)
        raise RunError(
            f"{self._path.parent}: process {owner.get('pid', '?')} on {owner.get('host', '?')} is writing this run; "
            "wait until it ends, stop it, or choose another --output-dir"
        )

    def _lock_file(self) -> bool:
        if self._file < 0:
            self._file = open_own(self._path, os.O_RDWR)
        if not granted(fcntl.lockf, self._file, fcntl.LOCK_EX):
            return False
        # In this order a kill in between leaves a signature, too; it is on the disk before what it accounts for.
        signature = json.dumps(self.owner).encode()
        os.pwrite(self._file, signature, 0)
        os.ftruncate(self._file, len(signature))
        os.fsync(self._file)
        return True

    def confirm(self) -> None:
        """Makes the file again where someone deleted it; RunError where another has its place, or the folder's."""
        folder = self._path.parent
        with saving(self._path, "lock the run"):
            if not (folder.is_dir() and os.path.samestat(os.stat(folder), os.fstat(self._folder))):
                raise RunError(
                    f"{folder}: moved, replaced or deleted while the run was written; stopped: what is done lies "
                    "in the folder that was moved; continue there with --resume"
                )
            try:
                same = os.path.samestat(os.lstat(self._path), os.fstat(self._file))
            except FileNotFoundError:
                os.close(self._file)
                self._file = -1
                same = self._lock_file()
        if not same:
            raise RunError(
                f"{self._path}: replaced while this process wrote the run, so that another may write it, too; stopped: "
                "see that only one is left, then continue with --resume"
            )

    def release(self) -> None:
        """Gives the lock back; may be called twice."""
        if _HELD.get(self._key) is self:
            del _HELD[self._key]
        self._close()

    def _close(self) -> None:
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._folder = -1


def granted(lock: Callable[[int, int], object], descriptor: int, kind: int, *, unknown: Collection[int] = ()) -> bool:
    """Whether the kernel gives a lock at once (fcntl's `flock` or `lockf`); False where somebody else has it.

    unknown: the errors of a filesystem without such locks, which count as given.
    """
    try:
        lock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {*_BUSY, *unknown}:
            raise
        return error.errno in unknown
    return True


def _disown() -> None:
    """In a forked child: the folder's lock, unlike the file's, would be the child's as well."""
    for lock in _HELD.values():
        lock._close()
    _HELD.clear()


os.register_at_fork(after_in_child=_disown)


def writer_of(folder: Path) -> dict[str, Any] | None:
    """Who writes the run right now ({"pid", "host", "started"}), or None when nobody does."""
    path = folder / LOCK_NAME
    with saving(path, "read the lock"):
        try:
            held = _HELD.get(_key(folder))
            if held is not None:
                return dict(held.owner)
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return None  # no writer would take it
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            return None if granted(fcntl.lockf, descriptor, fcntl.LOCK_SH) else owner_of(folder)
        finally:
            os.close(descriptor)


def owner_of(folder: Path) -> dict[str, Any]:
    """What the last writer signed the lock with; empty where there is no such signature."""
    path = folder / LOCK_NAME
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return {}
        owner, _ = json.JSONDecoder().raw_decode(path.read_bytes()[:4096].decode("utf-8", "replace"))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and owner.keys() >= {"pid", "host", "started"} else {}


def _key(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
