"""The state of every global random generator, in the form a checkpoint stores: tensors and JSON."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upslope.errors import RunError


def capture_random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of the generators of Python, numpy, torch on the CPU and, when in use, of every CUDA device.

    Save them as a tensor group and as a part of the state of `checkpoint.save`.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(inner["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index, device_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = device_state
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
    return _restore_cuda({name: tensor for name, tensor in tensors.items() if name.startswith("cuda.")})


def _restore_cuda(tensors: Mapping[str, Tensor]) -> list[str]:
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    notes = []
    for name, tensor in tensors.items():
        index = int(name.removeprefix("cuda."))
        if index < devices:
            torch.cuda.set_rng_state(tensor, index)
        else:
            notes.append(f"random state of CUDA device {index} not restored: this machine has {devices}")
    if devices > len(tensors) and torch.cuda.is_initialized():
        notes.append(f"the checkpoint has the random state of {len(tensors)} of this machine's {devices} CUDA devices")
    return notes


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy and torch, which a user's own task or reward may draw from.

    What the project itself samples and shuffles does not depend on them: that randomness is counter-based.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
