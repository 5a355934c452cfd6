"""The compute dtype: a function of what the hardware names, never of a measurement."""

from __future__ import annotations

import pytest
import torch

from upslope.backends import hardware
from upslope.errors import ConfigError


def test_named_dtypes() -> None:
    assert hardware.choose_dtype("float32")[0] is torch.float32
    assert hardware.choose_dtype("bfloat16")[0] is torch.bfloat16
    with pytest.raises(ConfigError, match="must be auto, float32 or bfloat16"):
        hardware.choose_dtype("fp8")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2", "avx512f"}, torch.float32),
        ({"avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16", "amx_tile"}, torch.bfloat16),
        ({"asimd", "bf16"}, torch.bfloat16),
        (set(), torch.float32),
    ],
)
def test_auto_follows_the_processor(features: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    dtype, reason = hardware.choose_dtype("auto")
    assert dtype is expected
    assert all(feature in reason for feature in features if "bf16" in feature)


def test_rate_is_plausible() -> None:
    rate = hardware.matmul_gflops(torch.float32, size=256, seconds=0.05)
    assert 0.1 < rate < 1e6
