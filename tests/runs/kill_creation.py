"""Makes a run and dies by SIGKILL at system calls of its creation, SQLite's own among them. A script of its own.

    python kill_creation.py states ROOT    ROOT/0, ROOT/1, ...: every state of the folder that a kill can leave
    python kill_creation.py kills ROOT     ROOT/run: killed before each system call in turn, and each time made again

The child is traced, so it stops before and after every system call; 77 is the exit code where that is not allowed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import upslope.runs.folder
from upslope.errors import RunError
from upslope.runs.folder import Run

TRACE_ME, NEXT_CALL = 0, 24
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long] * 4
_ptrace.restype = ctypes.c_long


def make(folder: Path) -> None:
    Run.create(output_dir=folder, verb="sft", config_toml="max_steps = 3\n").close()


def stops(folder: Path) -> Iterator[int]:
    """The child that makes the run, by its process id, at each of its stops; it is killed when this is closed."""
    pid = os.fork()
    if pid == 0:
        if _ptrace(TRACE_ME, 0, 0, 0):
            os._exit(77)
        os.kill(os.getpid(), signal.SIGSTOP)
        make(folder)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    try:
        while not os.WIFEXITED(status):
            yield pid
            _ptrace(NEXT_CALL, pid, 0, 0)
            _, status = os.waitpid(pid, 0)
        if os.WEXITSTATUS(status):
            sys.exit(os.WEXITSTATUS(status))
    finally:
        if not os.WIFEXITED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def content(folder: Path) -> list[tuple[str, bytes]]:
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [(str(path), path.read_bytes() if path.is_file() else b"") for path in paths]


def states(root: Path) -> None:
    folder, seen, number = root / "run", None, 0
    for _ in stops(folder):
        now = content(folder)
        if now != seen and folder.is_dir():
            shutil.copytree(folder, root / str(number))
            seen, number = now, number + 1


def kills(root: Path) -> None:
    folder, number = root / "run", 0
    while True:
        number += 1
        for at, _ in enumerate(stops(folder), start=1):
            if at == number:
                break
        else:
            break
        try:
            make(folder)
        except RunError as error:
            if "already holds a run" not in str(error):
                raise
            Run.open(folder).close()
        shutil.rmtree(folder)
    print(number)


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written
    upslope.runs.folder.describe_environment = lambda: {"pid": 1}
    {"states": states, "kills": kills}[sys.argv[1]](Path(sys.argv[2]))
