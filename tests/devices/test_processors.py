"""Lesser processors, as environment variables make them out of this one: both dtypes work there, to the last bit.

The variables are read when torch is loaded, so each is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import tiny_folder

LIMITS = {
    "without AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "UPSLOPE_KERNELS": "off"},
    "oneDNN without AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "torch without AVX-512": {"ATEN_CPU_CAPABILITY": "avx2"},
    "no kernels": {"UPSLOPE_KERNELS": "off"},
}
SCRIPT = """
import json, sys
import torch
from upslope.devices.hardware import choose_dtype
from upslope.cli import main
from upslope.commands.numerics import NETWORK_CHECKS, run_checks

report = run_checks(checks=NETWORK_CHECKS)
codes = [main(["generate", "--model", sys.argv[1], "--prompt", "hi", "--max-tokens", "4", "--dtype", dtype])
         for dtype in ("float32", "bfloat16")]
print(json.dumps({"checks": report["checks"], "codes": codes, "auto": str(choose_dtype("auto")[0])}))
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(LIMITS)]
)
def test_both_dtypes_work_to_the_last_bit(name: str, tmp_path: Path, root: Path) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in LIMITS["without AVX-512"]}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_folder(tmp_path / "tiny"))],
        env={**inherited, **LIMITS[name]},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [check for check in found["checks"] if not check["passed"]] == []
    assert found["codes"] == [0, 0]
    if LIMITS[name].get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        assert found["auto"] == "torch.float32"
        assert done.stderr.count("many times slower than in float32") == 1
