"""The compute dtype: a function of what the hardware names, never of a measurement."""

from __future__ import annotations

import pytest
import torch

from upslope.devices import hardware
from upslope.errors import ConfigError


def test_named_dtypes() -> None:
    assert hardware.choose_dtype("float32")[0] is torch.float32
    assert hardware.choose_dtype("bfloat16")[0] is torch.bfloat16
    with pytest.raises(ConfigError, match="must be auto, float32 or bfloat16"):
        hardware.choose_dtype("fp8")


@pytest.mark.parametrize(
    ("features", "onednn", "expected"),
    [
        ({"avx2", "avx512f"}, True, torch.float32),
        ({"avx2", "avx_ne_convert"}, True, torch.float32),
        ({"avx512f", "avx512_bf16"}, True, torch.bfloat16),
        ({"amx_bf16", "amx_tile"}, True, torch.bfloat16),
        ({"asimd", "bf16"}, True, torch.bfloat16),
        ({"avx512f", "avx512_bf16"}, False, torch.float32),
        ({"amx_bf16"}, False, torch.float32),
        (set(), True, torch.float32),
        (set(), False, torch.float32),
    ],
)
def test_auto_follows_the_processor_and_what_torch_uses_of_it(
    features: set[str], onednn: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(hardware, "onednn_bfloat16", lambda: onednn)
    dtype, reason = hardware.choose_dtype("auto")
    assert dtype is expected
    assert all(feature in reason for feature in features if "bf16" in feature)


def test_bfloat16_without_products_is_called_slow_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware._say_slow.cache_clear()
    monkeypatch.setattr(hardware, "onednn_bfloat16", lambda: True)
    hardware.choose_dtype("bfloat16")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(hardware, "onednn_bfloat16", lambda: False)
    for _ in range(2):
        assert hardware.choose_dtype("bfloat16") == (torch.bfloat16, "as asked")
    assert capsys.readouterr().err.count("many times slower than in float32") == 1
    hardware._say_slow.cache_clear()


def test_rate_is_plausible() -> None:
    rate = hardware.matmul_gflops(torch.float32, size=256, seconds=0.05)
    assert 0.1 < rate < 1e6
