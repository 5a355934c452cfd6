"""Where a run runs: what env.json says."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_PACKAGES = ("upslope", "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "datasets")


def describe_environment() -> dict[str, Any]:
    """Versions, machine, thread settings, git commit of the working folder and the command line, as plain values."""
    commit = _run_git("rev-parse", "HEAD")
    memory_gb = None
    with suppress(ValueError, OSError):
        memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {
        "time": time.time(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "",
        "folder": os.getcwd(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpus": usable_cpus(),
        "threads": _threads(),
        "memory_gb": memory_gb,
        "git": commit and {"commit": commit, "dirty": bool(_run_git("status", "--porcelain", "--untracked-files=no"))},
        "pid": os.getpid(),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    with suppress(OSError):  # Not Linux: the standard library's own answer is all there is.
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> int:
    """torch's thread count when torch is loaded, else what it will take: OMP_NUM_THREADS or the usable CPUs."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(wanted) if wanted.isdigit() and int(wanted) else usable_cpus()


def _run_git(*arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None
