"""What this processor multiplies fast, the compute dtype that follows, and threads that leave nothing behind."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import TypeVar

import torch

from upslope.errors import ConfigError
from upslope.kernels import processor
from upslope.kernels.products import onednn_bfloat16

BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


@cache
def cpu_features() -> frozenset[str]:
    """The processor's own feature names on Linux (avx2, avx512f, amx_bf16, ...); empty elsewhere."""
    lines = (line.partition(":") for line in processor().splitlines())
    names = (features.split() for key, _, features in lines if key.strip() in {"flags", "Features"})
    return frozenset(next(names, []))


def choose_dtype(wanted: str = "auto", device: torch.device | str = "cpu") -> tuple[torch.dtype, str]:
    """The compute dtype for `--dtype`, and the reason in words.

    "auto" depends on what the hardware says it can do and what torch makes of it, never on a measurement: the same
    machine kind always computes in the same dtype, which exact repeats and resumes stand on. `upslope doctor` measures
    beside it. bfloat16 that is asked for is given everywhere, exact and, with neither, slow; that is said once.
    Errors: ConfigError for an unknown name.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    on_gpu = torch.device(device).type == "cuda"
    if wanted in named:
        if wanted == "bfloat16" and not on_gpu and not onednn_bfloat16():
            _say_slow()
        return named[wanted], "as asked"
    if wanted != "auto":
        raise ConfigError(f"dtype is {wanted!r}; it must be auto, float32 or bfloat16")
    if on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the accelerator multiplies bfloat16 in hardware"
        return torch.float32, "the accelerator has no bfloat16 products"
    found = ", ".join(sorted(BF16_FEATURES & cpu_features()))
    if not found:
        return torch.float32, "the processor names no bfloat16 products (avx512_bf16, amx_bf16, bf16)"
    if not onednn_bfloat16():
        return torch.float32, f"the processor has {found}, but torch does not use it (no oneDNN, or ONEDNN_MAX_CPU_ISA)"
    return torch.bfloat16, f"the processor has {found}"


@cache
def _say_slow() -> None:
    line = "bfloat16 as asked, but without products for it here all but decoding is many times slower than in float32"
    print(f"upslope: {line}", file=sys.stderr, flush=True)


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, where that can be asked for (glibc); True where it was.

    A training step frees and asks again for the same gigabytes; given back to the system in between, every page of
    them is cleared and mapped anew, a tenth of the step's time.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 2**30)) and bool(mallopt(trim_threshold, 2**30))


def matmul_gflops(
    dtype: torch.dtype, *, device: torch.device | str = "cpu", size: int = 1024, seconds: float = 0.25
) -> float:
    """Measured rate of a size x size x size product in GFLOP/s: the best of the repeats that fit into `seconds`."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    _timed_product(a, b)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed_product(a, b))
    return 2 * size**3 / min(best, seconds) / 1e9


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def device_of_machine() -> torch.device:
    """The first GPU where there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """What `function` returns or raises, computed on a thread of its own that has ended since.

    For work beside a thread that computes all the time. OpenMP gives every thread that computes a team, which lasts as
    long as the thread. Where all teams together have more members than there are processors, GNU's runtime puts a
    waiting member to sleep at once, busy team or not, and waking it takes longer than most of decoding's operations.
    """
    found: Future[T] = Future()

    def work() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    thread = threading.Thread(target=work, name="apart", daemon=True)
    thread.start()
    thread.join()
    return found.result()
