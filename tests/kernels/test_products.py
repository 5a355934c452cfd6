"""Products of few rows: against the definition, and bit for bit those of torch's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from upslope import kernels
from upslope.kernels import products
from upslope.kernels.products import Reordered

pytestmark = pytest.mark.skipif(
    kernels.problem() is not None or not products._has_instruction(), reason="no kernels, or no bfloat16 products"
)
SHAPES = [(960, 576), (576, 1536), (100, 64), (33, 130), (17, 256), (512, 896), (40, 4864), (70, 514), (70, 530)]
ROWS = [*range(1, 17), 29, 64, 100]


def reordered(weight: torch.Tensor) -> Reordered:
    copied = Reordered.of(weight)
    assert copied is not None
    return copied


def test_by_hand() -> None:
    weight = torch.tensor([[1, 2, 3, 4], [0.5, 0, 0, -1]]).bfloat16()
    x = torch.tensor([[1, 1, 1, 1], [2, 0, 0, 4]]).bfloat16()
    bias = torch.tensor([1, -1]).bfloat16()
    assert reordered(weight).product(x).tolist() == [[10, -0.5], [18, -3]]
    assert reordered(weight).product(x, bias).tolist() == [[11, -1.5], [19, -4]]


@pytest.mark.parametrize(("columns", "width"), SHAPES)
def test_the_bits_of_torch(columns: int, width: int) -> None:
    """For any number of rows; torch is asked for many, since its small products may differ in a last bit."""
    torch.manual_seed(columns)
    weight, bias = torch.randn(columns, width).bfloat16(), torch.randn(columns).bfloat16()
    x = (3 * torch.randn(100, width)).bfloat16()
    copied, plain, moved = reordered(weight), F.linear(x, weight), F.linear(x, weight, bias)
    for rows in ROWS:
        assert torch.equal(copied.product(x[:rows]), plain[:rows]), rows
        assert torch.equal(copied.product(x[:rows], bias), moved[:rows]), rows


@pytest.mark.parametrize("width", [514, 576, 578, 1024, 1026, 1536, 2050])
def test_a_block_of_the_sum_ends_where_that_of_torch_does(width: int) -> None:
    """+2^26 at the beginning, -2^26 and 1 in one pair further on: the 1 is lost or not, as in torch's product."""
    places = range(64, width - 1, 2)
    weight, x = torch.ones(64, width), torch.zeros(len(places), width)
    weight[:, 1::2] = x[:, 1] = 2.0**13
    for row, place in enumerate(places):
        x[row, place + 1], x[row, place] = -(2.0**13), 1
    weight, x = weight.bfloat16(), x.bfloat16()
    found = reordered(weight).product(x)
    assert torch.equal(found, F.linear(x, weight))
    assert {0.0, 1.0} >= set(found.flatten().tolist())


def test_against_the_definition() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(50, 400).bfloat16(), torch.randn(9, 400).bfloat16()
    found = reordered(weight).product(x)
    exact = x.double() @ weight.double().t()
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_a_row_is_the_same_wherever_it_stands() -> None:
    torch.manual_seed(0)
    copied = reordered(torch.randn(70, 64).bfloat16())
    row = torch.randn(1, 64).bfloat16()
    alone = copied.product(row)
    for rows in ROWS:
        for place in {0, rows // 2, rows - 1}:
            x = torch.randn(rows, 64).bfloat16()
            x[place] = row[0]
            assert torch.equal(copied.product(x)[place], alone[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -0.0])
def test_numbers_at_the_edge_stay_in_their_row(value: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    x[3, 5] = value
    found, plain = reordered(weight).product(x), F.linear(x, weight)
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)
    assert found[[i for i in range(20) if i != 3]].isfinite().all()


def test_rows_that_do_not_follow_each_other() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64).bfloat16(), torch.randn(64, 8).bfloat16()
    assert torch.equal(
        reordered(weight).product(x.t()),
        reordered(weight).product(x.t().contiguous()),
    )


def test_the_number_of_threads_changes_nothing() -> None:
    torch.manual_seed(0)
    copied, x = reordered(torch.randn(1000, 64).bfloat16()), torch.randn(5, 64).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(copied.product(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in pairwise(found))


def test_what_does_not_fit_is_refused() -> None:
    copied = reordered(torch.zeros(4, 6).bfloat16())
    for x in (torch.zeros(1, 4).bfloat16(), torch.zeros(1, 6), torch.zeros(6).bfloat16()):
        with pytest.raises(ValueError, match="does not fit a weight of 6 inputs"):
            copied.product(x)
    assert Reordered.of(torch.zeros(4, 5).bfloat16()) is None
    assert Reordered.of(torch.zeros(4, 6)) is None


def test_a_product_that_adds_otherwise_is_not_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in a block of 96, or in two chains: other bits than those that a multiple of 64 could give."""

    def blocks_of(*sizes: int) -> None:
        def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            pairs = zip(x.float().split(sizes, 1), weight.float().split(sizes, 1), strict=True)
            return sum(a @ b.t() for a, b in pairs).bfloat16()

        monkeypatch.setattr(F, "linear", linear)

    products._block.cache_clear()
    try:
        for sizes in ((96, 96, 64), (64, 128, 64)):
            blocks_of(*sizes)
            assert products._block(50, 256) is None
            products._block.cache_clear()
    finally:
        products._block.cache_clear()
