"""Virtual environments of the peers that benchmarks compare with: made once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def bench_home() -> Path:
    """Where environments and made-up models of the benchmarks lie: $UPSLOPE_BENCH_HOME, else ~/.cache/upslope/bench."""
    return Path(os.environ.get("UPSLOPE_BENCH_HOME") or Path.home() / ".cache" / "upslope" / "bench")


def peer_python(name: str, requirements: list[str], *, remove: Sequence[str] = ()) -> Path:
    """The interpreter of an environment that holds `requirements`, made from the package index where it is missing.

    `remove` names packages that came along and must go. The environment lies in `bench_home`. Raises
    subprocess.CalledProcessError with pip's own message when something cannot be installed.
    """
    gone = [f"without {package}" for package in remove]
    digest = hashlib.sha256("\n".join([sys.version, *requirements, *gone]).encode()).hexdigest()[:10]
    folder = bench_home() / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"making the environment of {name} in {folder} ({', '.join(requirements)})", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for requirement in requirements:  # torch first: what follows must not choose another build
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
        if remove:
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *remove], check=True)
        (folder / "ready").touch()
    return python
