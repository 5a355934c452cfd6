"""Where upslope keeps what it can make or fetch again: models, corpora, compiled kernels."""

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """$UPSLOPE_HOME, else `upslope` in the platform's cache directory of the user."""
    if home := os.environ.get("UPSLOPE_HOME"):
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "upslope"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "upslope" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upslope"
