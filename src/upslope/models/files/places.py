"""What a name stands for before anything is fetched: of a run its best checkpoint's model, else its last one's; of a
name that is no model, a path or a model of the hub, and what lies near it."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from upslope.errors import ModelError

_CHECKPOINTS = "checkpoints"


def lies_in_run(path: Path) -> bool:
    """True for the path of a checkpoint: runs/x/checkpoints/step-N, and `best` and `last` beside it."""
    return path.parent.name == _CHECKPOINTS


def run_of(model_folder: Path) -> Path | None:
    """The run whose checkpoint holds this model folder (runs/x of runs/x/checkpoints/step-N/model), or None."""
    checkpoint = model_folder.absolute().parent
    run = checkpoint.parent.parent
    return run if lies_in_run(checkpoint) and (run / "config.toml").is_file() else None


def model_of_run(path: Path, say: Callable[[str], None]) -> Path:
    """The model folder in a run, in its checkpoints folder, or in one checkpoint; what is none of them, as it is.

    `say` gets a line where there was a choice. Raises ModelError for a checkpoint that is not there.
    """
    if lies_in_run(path):
        if (found := _pointed(path)) is None:
            hint = near_names(path) or f"{path.parent} holds none"
            raise ModelError(f"{path}: no such checkpoint with a model in it; {hint}")
        return found / "model"
    if path.name != _CHECKPOINTS and not (path / "config.toml").is_file():
        return path
    for name in ("best", "last"):
        found = _pointed((path if path.name == _CHECKPOINTS else path / _CHECKPOINTS) / name)
        if found is not None:
            say(f"{path}: using its {name} checkpoint, {found.name}")
            return found / "model"
    raise ModelError(f"{path}: this run has no checkpoint with a model yet; let it reach its first save")


def _pointed(path: Path) -> Path | None:
    """The checkpoint that a path stands for, if it holds a model; `best` and `last` are links, or files with a name."""
    if path.is_symlink() and path.name in ("best", "last"):
        path = path.parent / os.readlink(path)  # not `resolve`: what it leads to may be a link out of the run
    elif path.is_file():
        path = path.parent / path.read_text(encoding="utf-8", errors="replace").strip()
    return path if (path / "model").is_dir() else None


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
