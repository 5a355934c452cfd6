"""Virtual environments of the peers that benchmarks compare with: made once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def peer_python(name: str, requirements: list[str]) -> Path:
    """The interpreter of an environment that holds `requirements`, made from the package index where it is missing.

    It lies under $UPSLOPE_BENCH_HOME (default: ~/.cache/upslope/bench). Raises subprocess.CalledProcessError with
    pip's own message when something cannot be installed.
    """
    home = Path(os.environ.get("UPSLOPE_BENCH_HOME") or Path.home() / ".cache" / "upslope" / "bench")
    digest = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()[:10]
    folder = home / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        print(f"making the environment of {name} in {folder} ({', '.join(requirements)})", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for requirement in requirements:  # torch first: what follows must not choose another build
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
        (folder / "ready").touch()
    return python
