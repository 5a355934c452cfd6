"""What lies in a checkpoints folder: which folders are checkpoints, what each holds, and whether it is whole.

A list of files with their sizes and SHA-256 (`inventory`) tells later whether they are still the same (`damaged_file`).
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.atomic import is_temporary, saving, write_atomic
from upslope.errors import RunError

_FORMAT = 1
_MANIFEST = "manifest.json"
_SETTLED_NS = 2_000_000_000  # a younger file may change again without a new time of modification
_HASHES: dict[tuple[int, ...], str] = {}
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose manifest can be read. `serial` grows with every save, also when a run goes back in steps;
    `best` says that it was saved as the best so far.
    """

    path: Path
    step: int
    serial: int
    best: bool
    files: Mapping[str, Mapping[str, Any]]


def list_checkpoints(folder: Path | str) -> list[Checkpoint]:
    """The checkpoints with a readable manifest, oldest first (by the order of saving)."""
    found = []
    for path in step_folders(Path(folder)):
        with suppress(RunError):  # `resolve` reports it.
            found.append(read_manifest(path))
    return sorted(found, key=lambda each: each.serial)


def damage(path: Path, *, deep: bool = True, within: str = "") -> str | None:
    """What is wrong with a checkpoint folder (or what lies `within` a folder of it), in words, or None.

    `deep` reads every byte, else sizes are compared.
    """
    try:
        checkpoint = read_manifest(path)
    except RunError as error:
        return str(error).removeprefix(f"{path}: ")
    files = {name: facts for name, facts in checkpoint.files.items() if not within or name.startswith(f"{within}/")}
    return damaged_file(path, files, deep=deep)


def damaged_file(folder: Path, files: Mapping[str, Mapping[str, Any]], *, deep: bool = True) -> str | None:
    """The first file of a folder that is not what its `inventory` said, in words; None where all are."""
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if deep and sha256_of(file) != expected["sha256"]:
            return f"{name} is damaged (its SHA-256 differs)"
    return None


def step_folders(folder: Path) -> list[Path]:
    """The folders named like a checkpoint, whole or not, by name; a link that leads to none is one that is damaged."""
    if not folder.is_dir():
        return []
    with saving(folder, "read"):
        named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(path for path in named if path.is_dir() or path.is_symlink())


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name, -1 for other names."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def write_manifest(folder: Path, *, step: int, serial: int, best: bool) -> None:
    """Lists every file of a filled checkpoint folder; what is added later is not part of the checkpoint."""
    manifest = {"format": _FORMAT, "step": step, "serial": serial, "best": best, "files": inventory(folder)}
    write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=1))


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file in a folder, by its path inside, with its bytes and SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not is_temporary(path.name))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def sha256_of(path: Path) -> str:
    """The digest; of a file that stays as it is, computed once in a process."""
    with saving(path, "read"), open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        key = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if key in _HASHES:
            return _HASHES[key]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time_ns() - facts.st_mtime_ns > _SETTLED_NS:
        _HASHES[key] = digest
    return digest


def read_manifest(path: Path) -> Checkpoint:
    """What the folder `path` says it holds.

    Raises:
        RunError: no manifest (the folder was not written to its end), a damaged one, or one of another format.
    """
    manifest = path / _MANIFEST
    if path.is_symlink() and not path.exists():
        raise RunError(f"{path}: a link to {os.readlink(path)}, where nothing is")
    if not manifest.is_file():
        raise RunError(f"{path}: incomplete: {_MANIFEST} is missing")
    try:
        with saving(manifest, "read"):
            content = json.loads(manifest.read_text())
        form, step, serial, best, files = (content[key] for key in ("format", "step", "serial", "best", "files"))
        if not all(facts.keys() >= {"bytes", "sha256"} for facts in files.values()):
            raise ValueError("a file without its size or its digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path}: {_MANIFEST} is damaged") from error
    if form != _FORMAT:
        raise RunError(f"{path}: checkpoint format {form}, this program reads {_FORMAT}")
    return Checkpoint(path, step, serial, best, files)
