"""Whether a model folder is still what was written: one in a checkpoint has a manifest, one in the cache a record.

Free of torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from upslope.atomic import write_atomic
from upslope.errors import ModelError, RunError
from upslope.json_file import read_object
from upslope.manifest import damage, damaged_file, inventory, read_manifest, step_of

__all__ = ["RECORD", "check_intact", "damage_of_cached", "seal"]

RECORD = "upslope_files.json"


def check_intact(folder: Path | str) -> None:
    """Raise ModelError, naming the file and the remedy, where a model folder is not what upslope once wrote.

    Every byte of it is read, once in a process. A folder without manifest or record is taken as it is.
    """
    folder = Path(folder)
    checkpoint = folder.resolve().parent
    if folder.resolve().name == "model" and _is_checkpoint(checkpoint):
        problem = damage(checkpoint, within="model")
        if problem:
            raise ModelError(
                f"{checkpoint}: this checkpoint is damaged ({problem}); use another one of {checkpoint.parent}, or, if "
                "you changed it yourself, a copy of its model folder"
            )
    elif problem := damage_of_cached(folder):
        raise ModelError(f"{folder}: {problem}; delete the folder and fetch the model again")


def seal(folder: Path) -> None:
    """Note what a folder of the cache holds, for `damage_of_cached`."""
    write_atomic(folder / RECORD, json.dumps({"files": inventory(folder)}, indent=1))


def damage_of_cached(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None where it is whole, or was never sealed."""
    record = folder / RECORD
    if not record.is_file():
        return None
    try:
        return damaged_file(folder, read_object(record, ModelError)["files"])
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{RECORD} is damaged"


def _is_checkpoint(path: Path) -> bool:
    """By its name, which then calls for a manifest; or, of one that was renamed, by its manifest."""
    if step_of(path) >= 0:
        return True
    try:
        read_manifest(path)
    except RunError:
        return False
    return True
