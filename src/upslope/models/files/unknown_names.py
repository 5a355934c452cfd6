"""What is said of a name that is no model: whether it was meant as a path, and what lies near it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

__all__ = ["is_path", "near_names"]


def is_path(text: str) -> bool:
    """Whether a name that does not exist was meant for the file system and not for the hub."""
    first = Path(text).parts[:1]
    written = text.startswith((".", "~", os.sep)) or text.endswith("/") or text.count("/") > 1
    return written or ("/" in text and (first == ("runs",) or os.path.isdir(first[0])))


def near_names(path: Path) -> str:
    """Folders beside the place that `path` names, those of a like name first; "" where there are none."""
    if (path.parent / "config.toml").is_file():
        path = path.parent / "checkpoints" / path.name  # of a run it is a checkpoint that was meant
    try:
        there = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return ""
    if path.name in there:
        return f"did you mean {path}?"
    if near := difflib.get_close_matches(path.name, there, n=3):
        return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    more = f" and {len(there) - 6} more" if len(there) > 6 else ""
    return f"{path.parent} holds {', '.join(there[:6])}{more}" if there and path.parent.name else ""
