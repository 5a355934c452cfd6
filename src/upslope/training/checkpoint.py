"""Checkpoints that are whole or absent: everything an exact continuation needs, in safetensors and JSON.

    checkpoints/step-00000012/policy.safetensors    one file per named group of tensors
                              state.json            counters, controllers, random state, data position, config
                              model/                a Hugging Face folder, if the caller writes one
                              manifest.json         step, serial number, size and SHA-256 of every file
    checkpoints/last, best                          relative symbolic links (text files where links are unsupported)

A checkpoint is written into a hidden folder, fsynced and renamed; only then are `last` and `best` switched, and only
then is an older one deleted. So a kill at any moment leaves the checkpoint before or the new one, bit for bit. The
state of every global random generator is captured and restored here, too.
"""

import contextlib
import errno
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from upslope.atomic import (
    disk_error,
    point_to,
    publish_folder,
    read_object,
    read_pointer,
    remove_folder,
    saving,
    write_atomic,
)
from upslope.errors import RunError
from upslope.manifest import damage, list_checkpoints, read_manifest, step_folders, step_of, write_manifest

Tensors = dict[str, dict[str, Tensor]]

_GROUP = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The checkpoint to use; `note` is empty, or one line the user must see (a newer one is damaged)."""

    path: Path
    step: int
    note: str = ""


def save(
    folder: Path | str,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    write_model: Callable[[Path], object] | None = None,
    keep_last: int | None = 1,
    best: bool = False,
) -> Path:
    """Saves a checkpoint and returns its folder; when this returns, it is durable.

    Args:
        folder: the run's `checkpoints` folder; made if absent.
        step: the update after which this is the state.
        tensors: group name -> tensor name -> tensor (any dtype and device; contiguous CPU tensors are not copied).
        state: JSON values with text keys; floats keep every bit.
        write_model: writes a Hugging Face folder into the path it is given, the checkpoint's `model/`.
        keep_last: so many of the newest checkpoints stay, and the one that `best` names; None keeps all.
        best: make `best` name this one.

    A second save of one step does not overwrite the first but is called step-N.1; retention then removes the older.

    Raises:
        RunError: full disk or unwritable folder; every earlier checkpoint and both names are untouched.
        TypeError, ValueError: a state that is not JSON, a bad group name, keep_last < 1.
    """
    folder = Path(folder)
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last must be >= 1 or None, not {keep_last}")
    text = json.dumps(state)
    _check_keys(state, "state")
    serial = 1 + max((each.serial for each in list_checkpoints(folder)), default=0)
    if step < 0:
        raise ValueError(f"step must be >= 0, not {step}")
    names = (f"step-{step:08d}" + (f".{revision}" if revision else "") for revision in itertools.count())
    target = next(folder / name for name in names if not os.path.lexists(folder / name))
    with publish_folder(target) as inside:
        for group, named in tensors.items():
            if not _GROUP.fullmatch(group):
                raise ValueError(f"checkpoint group {group!r} must be letters, digits and underscores")
            with _safetensors_errors(target):
                save_file(_distinct(named), inside / f"{group}.safetensors", metadata={"format": "pt"})
        write_atomic(inside / "state.json", text)
        if write_model is not None:
            (inside / "model").mkdir()
            with _safetensors_errors(target):
                write_model(inside / "model")
        write_manifest(inside, step=step, serial=serial, best=best)
    settle(folder, keep_last=keep_last)
    return target


def settle(folder: Path | str, *, keep_last: int | None) -> None:
    """What follows the writing of a checkpoint: `last` and `best` are switched, then old ones deleted.

    `save` does it; a resumed run does it too, because a kill may have come between the two.
    """
    folder = Path(folder)
    whole = [each for each in list_checkpoints(folder) if damage(each.path, deep=False) is None]
    chosen = {"last": whole[-1:], "best": [each for each in whole if each.best][-1:]}
    for name, checkpoints in chosen.items():
        for checkpoint in checkpoints:
            if read_pointer(folder / name) != checkpoint.path.name:
                point_to(folder / name, checkpoint.path.name)
    best = read_pointer(folder / "best")
    for checkpoint in whole[:-keep_last] if keep_last is not None else []:
        if checkpoint.path.name != best:
            remove_folder(checkpoint.path)


def resume(
    folder: Path | str,
    *,
    keep_last: int | None,
    accept: Callable[[Resolved, dict[str, Any]], None] = lambda found, state: None,
) -> tuple[Resolved, Tensors, dict[str, Any]] | None:
    """`resolve`, `load` and `settle` in one: what a run continues from; None when there is no checkpoint at all.

    `accept` is given the checkpoint and its state, and may raise: then no file has changed.

    Raises:
        RunError: as `resolve`.
    """
    if not step_folders(Path(folder)):
        return None
    found = resolve(folder)
    tensors, state = load(found.path, verify=False)
    accept(found, state)
    settle(folder, keep_last=keep_last)
    return found, tensors, state


def peek(folder: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state, before its bytes are verified (`resume` does that); None: there is none."""
    for each in reversed(list_checkpoints(folder)):
        if damage(each.path, deep=False) is None:
            with contextlib.suppress(RunError):  # not JSON: a damaged one
                return each.path, read_object(each.path / "state.json", RunError)
    return None


def load(path: Path | str, *, verify: bool = True) -> tuple[Tensors, dict[str, Any]]:
    """Reads a checkpoint: (group -> name -> tensor on the CPU, state).

    Args:
        path: a checkpoint folder, or the name `last` or `best` in the checkpoints folder.
        verify: check every file's SHA-256 too, not only its size (not needed just after `resolve`).

    Raises:
        RunError: absent, incomplete or damaged; the message names the file. It never falls back to another one.
    """
    path = Path(path)
    if path.name in ("last", "best"):
        name = read_pointer(path)
        if name is None:
            raise RunError(f"{path}: there is no such checkpoint yet")
        path = path.parent / name
    problem = damage(path, deep=verify)
    if problem:
        raise RunError(f"{path}: {problem}; resume from another checkpoint in {path.parent}")
    checkpoint = read_manifest(path)
    tensors: Tensors = {}
    for name in checkpoint.files:
        if "/" not in name and name.endswith(".safetensors"):
            with saving(path / name, "read"), _safetensors_errors(path / name, "read"):
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
    return tensors, read_object(path / "state.json", RunError, f"resume from another checkpoint in {path.parent}")


def resolve(folder: Path | str, which: str | int = "last") -> Resolved:
    """Finds a checkpoint and verifies every byte of it.

    Args:
        folder: the run's `checkpoints` folder.
        which: "last": the newest complete one, and the note says which newer ones are damaged and how;
            "best"; a step number; or a folder name: exactly that one.

    Raises:
        RunError: there is no such checkpoint, or it is damaged.
    """
    folder = Path(folder)
    if which == "last":
        return _newest(folder)
    name = read_pointer(folder / "best") if which == "best" else str(which)
    if name is None:
        raise RunError(f"{folder}: no best checkpoint yet; take 'last' or a step")
    readable = list_checkpoints(folder)
    if name.isdigit():
        name = next((c.path.name for c in reversed(readable) if c.step == int(name)), f"step-{int(name):08d}")
    path = folder / name
    problem = damage(path) if path.is_dir() else "there is no such checkpoint"
    if problem:
        complete = ", ".join(each.path.name for each in readable) or "none"
        raise RunError(f"{path}: {problem}; checkpoints in {folder}: {complete}")
    return Resolved(path, read_manifest(path).step)


def _newest(folder: Path) -> Resolved:
    readable = list_checkpoints(folder)
    known = {each.path for each in readable}
    complaints = [
        (step_of(path), f"{path.name} is damaged ({damage(path)})")
        for path in step_folders(folder)
        if path not in known
    ]
    for checkpoint in reversed(readable):
        problem = damage(checkpoint.path)
        if problem is None:
            newer = [text for step, text in complaints if step >= checkpoint.step]
            note = f"{folder}: {'; '.join(newer)}; using {checkpoint.path.name}" if newer else ""
            return Resolved(checkpoint.path, checkpoint.step, note)
        complaints.append((checkpoint.step, f"{checkpoint.path.name} is damaged ({problem})"))
    reason = "; ".join(text for _, text in complaints) or "there is none yet"
    raise RunError(f"{folder}: no complete checkpoint: {reason}; start the run again without --resume")


def _check_keys(value: Any, where: str) -> None:
    # json would turn the key 1 into "1" without a word, and the resumed run would miss it.
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"checkpoint {where} has the key {key!r}; keys must be text")
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_keys(item, where)


def _distinct(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, and none sharing bytes (a tied weight is written twice)."""
    ready = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    end = 0
    for name, tensor in sorted(ready.items(), key=lambda item: item[1].data_ptr()):
        if tensor.numel() and tensor.data_ptr() < end:
            ready[name] = tensor.clone()
        else:
            end = max(end, tensor.data_ptr() + tensor.numel() * tensor.element_size())
    return ready


@contextmanager
def _safetensors_errors(path: Path, action: str = "write") -> Iterator[None]:
    """Turns errors of the safetensors library, which hide the errno in their text, into RunErrors."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise disk_error(OSError(int(found[1]) if found else errno.EIO, str(error)), path, action) from error


class Part:
    """A piece of a learner with its share of a checkpoint, under names that no other part uses; by default none."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors, by file and name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What else it is, as JSON."""
        return {}

    def load(self, tensors: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take back, bit for bit, what `tensors` and `state` gave."""


def capture_random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of the generators of Python, numpy, torch on the CPU and, when in use, of every CUDA device.

    Save them as a tensor group and as a part of the state of `checkpoint.save`.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
        **{f"cuda.{index}": one for index, one in enumerate(torch.cuda.get_rng_state_all() if in_use else [])},
    }
    state = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "bit_generator": str(numpy_state["bit_generator"]),
            "position": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    return tensors, state


def restore_random_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """Puts every generator back where `capture_random_state` found it.

    Returns:
        One line per generator that this machine lacks or that the checkpoint does not cover (another number of CUDA
        devices); empty means that the random numbers continue exactly.

    Raises:
        RunError: the checkpoint holds no random state, or one of another kind of generator.
    """
    missing = {"python", "numpy", "torch"} - tensors.keys()
    if missing:
        raise RunError(f"the checkpoint lacks the random state of {', '.join(sorted(missing))}; it cannot be resumed")
    saved_python, saved_numpy = state["python"], state["numpy"]
    current = np.random.get_state(legacy=False)
    if saved_numpy["bit_generator"] != current["bit_generator"] or saved_python["version"] != random.getstate()[0]:
        raise RunError("the checkpoint's random state is of another kind of generator; resume with the old versions")
    random.setstate((saved_python["version"], tuple(tensors["python"].tolist()), saved_python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": saved_numpy["bit_generator"],
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": saved_numpy["position"]},
            "has_gauss": saved_numpy["has_gauss"],
            "gauss": saved_numpy["gauss"],
        }
    )
    torch.set_rng_state(tensors["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    notes = []
    saved = {int(name.removeprefix("cuda.")): tensor for name, tensor in tensors.items() if name.startswith("cuda.")}
    for index, tensor in saved.items():
        if index < devices:
            torch.cuda.set_rng_state(tensor, index)
        else:
            notes.append(f"random state of CUDA device {index} not restored: this machine has {devices}")
    if devices > len(saved) and torch.cuda.is_initialized():
        notes.append(f"the checkpoint has the random state of {len(saved)} of this machine's {devices} CUDA devices")
    return notes


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy and torch, which a user's own task or reward may draw from.

    What the project itself samples and shuffles does not depend on them: that randomness is counter-based.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
