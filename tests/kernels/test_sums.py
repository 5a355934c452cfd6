"""Sums of gradients: float32 addition, whatever the storage of the part."""

from __future__ import annotations

import pytest
import torch

from upslope.kernels.rows import accumulate_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (413, 331), (70001,)])
def test_it_is_float32_addition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total, part = torch.randn(shape), torch.randn(shape).to(dtype)
    expected = total + part
    assert accumulate_(total, part).data_ptr() == total.data_ptr()
    assert torch.equal(total, expected)


def test_strided_and_wide_tensors_are_added_too() -> None:
    total, part = torch.randn(6, 4), torch.randn(4, 6).t()
    expected = total + part
    assert torch.equal(accumulate_(total, part), expected)
    double = torch.ones(3, dtype=torch.float64)
    assert accumulate_(double, torch.ones(3, dtype=torch.float64)).tolist() == [2.0, 2.0, 2.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(RuntimeError):
        accumulate_(torch.zeros(2), torch.zeros(3))
