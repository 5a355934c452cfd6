"""Weights laid out for decoding: the same bits as the plain product, and no stale copy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from upslope.kernels import products as packed_module
from upslope.kernels.products import PackedWeights, Reordered, onednn_bfloat16

copies = pytest.mark.skipif(not onednn_bfloat16(), reason="no copies: oneDNN makes no bfloat16 products here")


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 64), (48, 7), (576, 960), (1536, 576), (100, 37)])
def test_bits_are_those_of_the_plain_product(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    x, packed = torch.randn(300, inputs).bfloat16(), PackedWeights()
    for b in (None, bias):
        plain = F.linear(x, weight, b)
        for rows in (1, 4, 8, 37, 64, 300):
            assert torch.equal(packed.linear(x[:rows], weight, b), plain[:rows]), rows
    if onednn_bfloat16():
        assert weight.numel() * 2 <= packed.bytes < (outputs + 32) * inputs * 2


def test_without_onednn_it_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "onednn_bfloat16", lambda: False)
    torch.manual_seed(0)
    weight, x, packed = torch.randn(960, 576).bfloat16(), torch.randn(37, 576).bfloat16(), PackedWeights()
    plain = F.linear(x, weight)
    for rows in (1, 4, 8, 37):
        assert torch.equal(packed.linear(x[:rows], weight), plain[:rows]), rows
    assert packed.bytes == 0


@copies
def test_other_processors_leave_it_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reordered, "of", lambda weight: None)
    torch.manual_seed(0)
    weight, x, packed = torch.randn(960, 576).bfloat16(), torch.randn(37, 576).bfloat16(), PackedWeights()
    assert torch.equal(packed.linear(x, weight), F.linear(x, weight))
    assert packed.bytes == weight.numel() * 2
    assert packed.bytes == weight.numel() * 2


@copies
def test_a_changed_weight_needs_clearing() -> None:
    torch.manual_seed(0)
    weight, x, packed = torch.randn(32, 64).bfloat16(), torch.randn(8, 64).bfloat16(), PackedWeights()
    before = packed.linear(x, weight)
    weight.mul_(2)
    assert torch.equal(packed.linear(x, weight), before)
    packed.clear()
    assert torch.equal(packed.linear(x, weight), F.linear(x, weight))


def test_an_address_is_not_mistaken_for_another_weight() -> None:
    packed, x = PackedWeights(), torch.randn(8, 64).bfloat16()
    for _ in range(20):
        weight = torch.randn(32, 64).bfloat16()
        assert torch.equal(packed.linear(x, weight), F.linear(x, weight))


def test_float32_is_left_to_the_plain_product() -> None:
    packed, weight, x = PackedWeights(), torch.randn(32, 64), torch.randn(8, 64)
    assert torch.equal(packed.linear(x, weight), F.linear(x, weight))
    assert packed.bytes == 0
