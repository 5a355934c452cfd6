"""`upslope doctor`: what this machine has, what would run on it, and what to do where something is amiss."""

import importlib.metadata
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement

from upslope import extras, kernels
from upslope.cache import cache_root
from upslope.devices.hardware import choose_dtype, cpu_features, matmul_gflops
from upslope.models.attention.context import fused_attention
from upslope.options import DoctorOptions
from upslope.runs.environment import describe_environment, usable_cpus, version_of
from upslope.version import __version__

DEMO_MEMORY_GB = 6.0
"""The most the demo may take; tests of the demo hold it to this."""
CHECKPOINT_GB = 1.7
"""One checkpoint of a 135M-parameter model: float32 weights and AdamW's two moments."""
SHOWN_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
GB = 1e9


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `warn` leaves the exit code alone: upslope runs, with a limit that `detail` names."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def run(options: DoctorOptions) -> int:
    """Print the machine and the checks (or, with --numerics, the product's own numeric checks); 1 when one failed."""
    report = numerics(options) if options.numerics else examine()
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_numeric_lines(report) if options.numerics else _machine_lines(report)))
    return 1 if report["failed"] else 0


def numerics(options: DoctorOptions) -> dict[str, Any]:
    """The numeric checks with progress on stderr; see upslope.commands.numerics."""
    from upslope.commands.numerics import run_checks

    def announce(name: str) -> None:
        if not options.json:
            print(f"checking {name} ...", file=sys.stderr, flush=True)

    return run_checks(announce)


def examine() -> dict[str, Any]:
    """{"machine": facts, "passed": n, "warned": n, "failed": n, "checks": [...]}."""
    rates = {dtype: round(matmul_gflops(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    checks = [
        _python(),
        *_parts(),
        _extra("tasks", "warn"),
        _extra("data", "ok"),
        _extra("eval", "ok"),
        _memory(),
        _threads(),
        _writable("working folder", Path.cwd(), 3 * CHECKPOINT_GB, "run elsewhere or free some space"),
        _writable("model cache", cache_root(), 1.0, "free some space, or point UPSLOPE_HOME elsewhere"),
        _bundled_model(),
        _dtype(rates),
        _kernels(),
        *_gpu_attention(),
    ]
    count = {status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")}
    return {
        "machine": machine(rates),
        "passed": count["ok"],
        "warned": count["warn"],
        "failed": count["fail"],
        "checks": [asdict(check) for check in checks],
    }


def machine(rates: dict[torch.dtype, int]) -> dict[str, Any]:
    """Facts without a verdict; `rates` in GFLOP/s."""
    facts = {
        **describe_environment(),
        "upslope": __version__,
        "physical_cores": psutil.cpu_count(logical=False),
        "cpu_features": [name for name in SHOWN_FEATURES if name in cpu_features()],
        "memory_free_gb": round(psutil.virtual_memory().available / GB, 1),
        "torch_build": {
            "version": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "mkldnn": torch.backends.mkldnn.is_available(),
        },
        "accelerators": [_accelerator(index) for index in range(torch.cuda.device_count())],
        "matmul_gflops": {"float32": rates[torch.float32], "bfloat16": rates[torch.bfloat16]},
    }
    for private in ("command", "folder", "git", "pid", "time", "host"):
        facts.pop(private, None)
    return facts


def _accelerator(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    dtype, reason = choose_dtype("auto", f"cuda:{index}")
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / GB, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "dtype": str(dtype).removeprefix("torch."),
        "reason": reason,
    }


def _judged(
    name: str, good: bool, detail: str, fix: str, *, amiss: str = "", bad: Literal["warn", "fail"] = "warn"
) -> Check:
    """ok with the detail; else `bad`, with what is amiss after the detail, and what to do."""
    return Check(name, "ok", detail) if good else Check(name, bad, detail + amiss, fix)


def _python() -> Check:
    good, found = (3, 11) <= sys.version_info[:2] < (3, 14), ".".join(map(str, sys.version_info[:3]))
    return _judged("python", good, found, "use Python 3.11, 3.12 or 3.13", bad="fail")


def _parts() -> list[Check]:
    """Every core dependency against the version this project declares."""
    declared = importlib.metadata.requires("upslope") if version_of("upslope") else None
    if declared is None:
        return [Check("parts", "warn", "upslope runs from source, uninstalled", "pip install -e .")]
    requirements = [Requirement(line) for line in declared]
    return [_part(item) for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]


def _part(requirement: Requirement) -> Check:
    version = version_of(requirement.name)
    if version is None:
        return Check(requirement.name, "fail", "not installed", f"pip install '{requirement}'")
    good, needed = requirement.specifier.contains(version, prereleases=True), f", needed {requirement.specifier}"
    return _judged(requirement.name, good, version, f"pip install '{requirement}'", amiss=needed, bad="fail")


def _extra(extra: str, when_missing: Literal["ok", "warn"]) -> Check:
    missing = [module for module in extras.MODULES[extra] if not extras.installed(module)]
    if not missing:
        return Check(f"extra {extra}", "ok", ", ".join(extras.MODULES[extra]))
    fix = f"pip install 'upslope[{extra}]'"
    return Check(f"extra {extra}", when_missing, f"without {', '.join(missing)}: {extras.PURPOSE[extra]}", fix)


def _memory() -> Check:
    free, limit = psutil.virtual_memory().available / GB, _cgroup_memory()
    usable = free if limit is None else min(free, limit)
    detail = f"{usable:.1f} GB to use; the demo (SFT, then PPO on smollm2-135m) stays below {DEMO_MEMORY_GB:g}"
    fix = "close other programs, or train with --micro-batch-tokens 1024 --gradient-checkpointing or --lora-rank 16"
    bad = "warn" if usable >= DEMO_MEMORY_GB / 2 else "fail"
    return _judged("memory", usable >= DEMO_MEMORY_GB, detail, fix, bad=bad)


def _cgroup_memory() -> float | None:
    """GB left under a container's limit, or None where there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return None
    return None if limit == "max" else max(0.0, (int(limit) - int(used)) / GB)


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), _usable_cores()
    detail = f"torch uses {threads} of {cores:g} usable cores"
    fix, amiss = f"OMP_NUM_THREADS={max(1, int(cores))}", ": they will wait for each other"
    return _judged("threads", threads <= max(1, cores), detail, fix, amiss=amiss)


def _usable_cores() -> float:
    cores = float(usable_cpus())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, int(quota) / int(period))


def _writable(name: str, folder: Path, wanted_gb: float, fix: str) -> Check:
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{there} cannot be written to", fix)
    free = shutil.disk_usage(there).free / GB
    amiss = f", {wanted_gb:.1f} GB are wanted for checkpoints and models"
    return _judged(name, free >= wanted_gb, f"{folder}: {free:.0f} GB free", fix, amiss=amiss)


def _bundled_model() -> Check:
    folder = cache_root() / "models" / "smollm2-135m"
    if (folder / "config.json").is_file():
        return Check("smollm2-135m", "ok", f"in {folder}: works offline")
    return Check("smollm2-135m", "ok", "not here yet; the first use downloads about 93 MB", "upslope fetch")


def _dtype(rates: dict[torch.dtype, int]) -> Check:
    dtype, reason = choose_dtype("auto")
    names = {kind: str(kind).removeprefix("torch.") for kind in rates}
    measured = ", ".join(f"{names[kind]} {rate} GFLOP/s" for kind, rate in rates.items())
    detail = f"auto is {names[dtype]}: {reason} (measured: {measured})"
    best = max(rates, key=rates.__getitem__)
    return _judged("dtype", rates[dtype] >= 0.8 * rates[best], detail, f"try --dtype {names[best]}")


def _kernels() -> Check:
    why = kernels.problem()
    if why is None:
        return Check("kernels", "ok", "compiled for this processor")
    if "AVX-512" in why:
        return Check("kernels", "ok", f"not used: {why}")
    fix = "install a C++ compiler (Debian, Ubuntu: apt install g++), or live with the slower torch code"
    return Check("kernels", "warn", f"not used: {why}", "unset it" if "UPSLOPE_KERNELS" in why else fix)


def _gpu_attention() -> list[Check]:
    """What attends on a GPU, where there is one."""
    if not torch.cuda.is_available():
        return []
    if fused_attention():
        return [Check("GPU attention", "ok", "flex_attention and Triton; decoding steps are CUDA graphs")]
    fix = "install the Triton of this build of torch (pip install triton), or live with the slower torch code"
    return [Check("GPU attention", "warn", "Triton is not installed", fix)]


def _machine_lines(report: dict[str, Any]) -> list[str]:
    facts = report["machine"]
    build = facts["torch_build"]
    lines = [
        f"upslope {facts['upslope']} on {facts['platform']}",
        f"processor    {facts['cpu']}: {facts['cpus']} usable, {facts['physical_cores']} physical cores",
        f"             {' '.join(facts['cpu_features']) or 'no feature list on this system'}",
        f"memory       {facts['memory_gb']} GB, {facts['memory_free_gb']} GB free",
        f"torch        {build['version']}, {build['cpu_capability']}, CUDA {build['cuda'] or 'none'}",
        "products     " + ", ".join(f"{name} {rate} GFLOP/s" for name, rate in facts["matmul_gflops"].items()),
    ]
    lines += [f"accelerator  {gpu['name']}, {gpu['memory_gb']} GB, {gpu['dtype']}" for gpu in facts["accelerators"]]
    lines.append("")
    for check in report["checks"]:
        lines.append(f"{check['status']:<5}{check['name']:<18}{check['detail']}")
        if check["fix"]:
            lines.append(f"{'':<23}-> {check['fix']}")
    lines.append(f"\n{report['passed']} passed, {report['warned']} warnings, {report['failed']} failed")
    return lines


def _numeric_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{'ok' if check['passed'] else 'FAIL':<5}{check['name']:<34}{check['seconds']:6.1f} s  {check['detail']}"
        for check in report["checks"]
    ]
    return [*lines, f"\n{report['passed']} passed, {report['failed']} failed"]
