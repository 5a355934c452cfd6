"""Fused kernels for CPUs in plain C++: attention, norms and activations, everything over the vocabulary, AdamW.

They do on a CPU what the torch code beside them does on any device, in fewer passes over memory and, for all of
decoding, scoring and training, in the same order of operations per row: the same bits. Where they cannot be compiled
(`upslope doctor` says why) the torch code runs.

They are compiled with the machine's own C++ compiler, once, into the user's cache. The sources need nothing but a
compiler: no headers of torch or Python. A library's name holds a digest of sources, compiler and processor, so that a
change of any makes another one.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.cache import cache_root

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_HERE = Path(__file__).parent
# no contraction: where a multiply-add is fused is written in the sources, so that every caller gets the same bits
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-w")
_TIMEOUT_S = 180


class Unavailable(RuntimeError):
    """The kernels cannot be used here; the message is one line that says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises Unavailable: switched off, no compiler, or one that fails.

    UPSLOPE_KERNELS=off switches them off; CXX names another compiler than c++.
    """
    if os.environ.get("UPSLOPE_KERNELS", "").lower() in ("off", "0", "no"):
        raise Unavailable("switched off by UPSLOPE_KERNELS")
    if sys.platform == "win32":
        raise Unavailable("not built on Windows")
    if "avx512f" not in processor().split():
        raise Unavailable("written for AVX-512, which this processor does not have: torch's own code is faster here")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++, clang++) on the PATH")
    try:
        target = cache_root() / "kernels" / f"{_digest(compiler)}.so"
        if not _whole(target):
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{compiler} took longer than {_TIMEOUT_S} s") from None
    except OSError as error:
        raise Unavailable(f"{error.strerror or error}") from error


def _sources() -> list[Path]:
    return sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")])


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout
    parts = [version, processor().encode(), " ".join(_FLAGS).encode(), *(p.read_bytes() for p in _sources())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def processor() -> str:
    """What -march=native sees, as far as the system tells it: model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _whole(target: Path) -> bool:
    """Whether the library is there, with the bytes that were compiled."""
    if not target.is_file():
        return False
    seal = target.with_suffix(".sha256")
    if seal.is_file() and seal.read_bytes() == _seal(target):
        return True
    print(f"upslope: {target}: damaged, or of an earlier version; compiled again", file=sys.stderr)
    return False


def _seal(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def _compile(compiler: str, target: Path) -> None:
    """Into a file of its own, then under its name in one move: several processes may do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        sources = [str(p) for p in _sources() if p.suffix == ".cpp"]
        problem = ""
        for threads in (["-fopenmp"], []):  # Apple's compiler has no OpenMP: one thread there
            command = [compiler, *_FLAGS, *threads, *sources, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode == 0:
                seal = made.with_suffix(".sha256")
                seal.write_bytes(_seal(made))
                os.replace(seal, target.with_suffix(".sha256"))
                os.replace(made, target)
                return
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            problem = lines[0] if lines else f"{compiler} ended with code {done.returncode}"
        raise Unavailable(f"{compiler} could not compile them: {problem}")


@cache
def problem() -> str | None:
    """Why the kernels cannot be used on this machine; None where they can."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, all of one dtype, float32 or bfloat16."""
    first = tensors[0]
    if first.dtype not in _KINDS or problem() is not None:
        return False
    return all(x.dtype == first.dtype and x.device.type == "cpu" for x in tensors)


class Functions:
    """The library's functions upslope_NAME as attributes, given NAME=their argument types; none returns anything.

    The library is opened, and compiled where need be, when the first of them is asked for.
    """

    def __init__(self, **signatures: Sequence[Any]) -> None:
        self._signatures = signatures

    def __getattr__(self, name: str) -> Any:
        function = getattr(library(), f"upslope_{name}")
        function.argtypes, function.restype = self._signatures[name], None
        setattr(self, name, function)
        return function


def kind_of(dtype: torch.dtype) -> int:
    """The kernels' number of a storage type."""
    return _KINDS[dtype]


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where contiguous tensors lie; None, which is a null pointer, for None."""
    return [None if x is None else x.data_ptr() for x in tensors]
