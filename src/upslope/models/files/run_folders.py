"""Which model a run's folder stands for: that of its best checkpoint, else of its last."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from upslope.errors import ModelError
from upslope.models.files.unknown_names import near_names

__all__ = ["lies_in_run", "model_of_run", "run_of"]

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
        found = _pointed(path)
        if found is None:
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
