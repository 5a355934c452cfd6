"""Masked statistics, whitening (rows 4, 6) and the ways of averaging a token loss (rows 11, 12)."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope.functional.masking import loss_weights, masked_mean, masked_sum, masked_var, whiten

X = [[1.0, 2.0, 30.0], [4.0, 50.0, 60.0]]
M = [[1, 1, 0], [1, 0, 0]]


def test_hand_constants() -> None:
    x, mask = torch.tensor(X), torch.tensor(M)
    assert masked_sum(x, mask) == 7
    assert masked_sum(x, mask, dim=1).tolist() == [3, 4]
    assert masked_sum(x, mask, dim=0).tolist() == [5, 2, 0]
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2, 0]
    assert masked_var(x, mask).item() == pytest.approx(statistics.variance([1, 2, 4]))
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(statistics.pvariance([1, 2, 4]))
    # deviations -4/3, -1/3, 5/3 over sqrt(7/3)
    root = math.sqrt(7 / 3)
    expected = [[-4 / 3 / root, -1 / 3 / root, 0], [5 / 3 / root, 0, 0]]
    torch.testing.assert_close(whiten(x, mask), torch.tensor(expected))


@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_against_the_definition(pairs: list[tuple[float, bool]]) -> None:
    x = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    mask = torch.tensor([p[1] for p in pairs])
    chosen = [p[0] for p in pairs if p[1]]
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(chosen), abs=1e-9)
    mean = math.fsum(chosen) / len(chosen) if chosen else 0.0
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-9)
    variance = math.fsum((c - mean) ** 2 for c in chosen) / (len(chosen) - 1) if len(chosen) > 1 else 0.0
    assert masked_var(x, mask).item() == pytest.approx(variance, abs=1e-9)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize(
    "function",
    [masked_sum, masked_mean, masked_var, lambda x, m: whiten(x, m).square().sum(), lambda x, m: whiten(x, m)[0, 0]],
)
def test_row04_masked_junk_changes_neither_value_nor_gradient(function, junk: float) -> None:
    mask = torch.tensor(M).bool()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        value = function(x, mask)
        value.backward()
        assert x.grad is not None
        return value.detach(), x.grad

    value, gradient = run(torch.tensor(X))
    dirty_value, dirty_gradient = run(torch.tensor(X).masked_fill(~mask, junk))
    assert torch.equal(value, dirty_value)
    assert torch.equal(gradient, dirty_gradient)
    assert (gradient[~mask] == 0).all()


def test_row04_padding_width_does_not_matter() -> None:
    x, mask = torch.randn(4, 9), torch.rand(4, 9) < 0.6
    wide = torch.cat([x, torch.full((4, 17), math.nan)], 1)
    wide_mask = torch.cat([mask, torch.zeros(4, 17, dtype=torch.bool)], 1)
    torch.testing.assert_close(whiten(x, mask), whiten(wide, wide_mask)[:, :9])


def test_row06_whitening_has_mean_zero_and_unbiased_variance_one() -> None:
    x, mask = torch.randn(5, 7, dtype=torch.float64) * 3 + 8, torch.rand(5, 7) < 0.7
    white = whiten(x, mask)
    assert abs(white[mask].mean()) < 1e-12
    assert white[mask].var(unbiased=True).item() == pytest.approx(1, abs=1e-7)
    assert (white[~mask] == 0).all()
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], white[mask] + x[mask].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("c", [0.1, 0.3, 1 / 3, 0.7, 1e6 / 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_row06_equal_values_whiten_to_exactly_zero(n: int, c: float, dtype: torch.dtype) -> None:
    x = torch.full((1, n), c, dtype=dtype)
    assert (whiten(x, torch.ones(1, n)) == 0).all()


def test_row06_one_token_or_none_is_no_nan() -> None:
    one = whiten(torch.tensor([[3.0, math.nan]]), torch.tensor([[1, 0]]))
    assert one.tolist() == [[0, 0]]
    assert whiten(torch.randn(2, 3), torch.zeros(2, 3)).abs().sum() == 0
    assert masked_mean(torch.randn(2, 0), torch.zeros(2, 0)) == 0
    assert whiten(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)


def test_whitening_is_invariant_to_order_and_scale() -> None:
    x, mask = torch.randn(40, dtype=torch.float64), torch.rand(40) < 0.5
    order = torch.randperm(40)
    torch.testing.assert_close(whiten(x[order], mask[order]), whiten(x, mask)[order])
    torch.testing.assert_close(whiten(5 * x - 2, mask), whiten(x, mask), rtol=1e-6, atol=1e-7)


def test_integers_and_half_precisions_are_promoted() -> None:
    assert masked_mean(torch.tensor([1, 2]), torch.tensor([1, 1])).item() == 1.5
    x = torch.ones(5000, dtype=torch.bfloat16)
    assert masked_sum(x, torch.ones(5000)).item() == 5000
    assert masked_sum(x, torch.ones(5000)).dtype == torch.float32


def test_wrong_masks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x \[2, 3\], mask \[2\]"):
        masked_sum(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="only 0 and 1"):
        masked_mean(torch.zeros(2), torch.tensor([0.5, 1.0]))


class TestLossWeights:
    LENGTHS = (10, 2, 3, 7)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.arange(10) < torch.tensor(self.LENGTHS).unsqueeze(1)
        # token t of row i has loss i + 1
        return torch.arange(1.0, 5.0).unsqueeze(1).expand(4, 10), mask

    @pytest.mark.parametrize(
        ("mode", "constant", "expected"),
        [
            ("token_mean", None, (10 * 1 + 2 * 2 + 3 * 3 + 7 * 4) / 22),
            ("sequence_mean_token_mean", None, (1 + 2 + 3 + 4) / 4),
            ("sequence_mean_token_sum", None, (10 + 4 + 9 + 28) / 4),
            ("constant", 16, (10 + 4 + 9 + 28) / (4 * 16)),
        ],
    )
    def test_row12_hand_values(self, mode, constant: float | None, expected: float) -> None:
        loss, mask = self.batch()
        weights, denominator = loss_weights(mask, mode, constant=constant)
        assert ((weights * loss).sum() / denominator).item() == pytest.approx(expected)

    @pytest.mark.parametrize("mode", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"])
    def test_row12_a_fully_masked_row_weighs_nothing(self, mode) -> None:
        _, mask = self.batch()
        constant = 16 if mode == "constant" else None
        weights, denominator = loss_weights(mask, mode, constant=constant)
        more, more_denominator = loss_weights(torch.cat([mask, torch.zeros(2, 10).bool()]), mode, constant=constant)
        assert denominator == more_denominator
        assert torch.equal(more[:4], weights)
        assert (more[4:] == 0).all()

    @pytest.mark.parametrize("mode", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"])
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_row11_row48_any_split_of_the_step_gives_the_same_gradient(self, mode, rows: int) -> None:
        _, mask = self.batch()
        constant = 16 if mode == "constant" else None
        parameter = torch.randn(10, dtype=torch.float64, requires_grad=True)
        inputs = torch.randn(4, 10, 10, dtype=torch.float64)

        def gradient(parts: list[list[int]]) -> torch.Tensor:
            total = sum(loss_weights(mask[part], mode, constant=constant)[1] for part in parts)
            result = torch.zeros(10, dtype=torch.float64)
            for part in parts:
                weights, _ = loss_weights(mask[part], mode, constant=constant)
                loss = masked_sum(weights * (inputs[part] @ parameter).square(), mask[part]) / total
                result += torch.autograd.grad(loss, parameter)[0]
            return result

        whole = gradient([[0, 1, 2, 3]])
        order = [2, 0, 3, 1]
        split = gradient([order[i : i + rows] for i in range(0, 4, rows)])
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        ("mode", "constant"), [("mean", None), ("constant", None), ("token_mean", 3.0), ("constant", 0.0)]
    )
    def test_wrong_modes_are_refused(self, mode, constant: float | None) -> None:
        with pytest.raises(ValueError, match=r"mode|constant"):
            loss_weights(torch.ones(2, 3), mode, constant=constant)
