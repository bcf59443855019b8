"""GPTQ beside an fp64 twin that knows nothing of Cholesky factors, and beside plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdscale.errors import SelfCheckError
from kdscale.quantize.forms import Quantized
from kdscale.quantize.gptq import _inverse_factor, _rounded_in_turn, fitted_scales, gptq
from kdscale.quantize.integers import rounded
from kdscale.weights.integer_grid import IntegerGrid

OUTPUTS, INPUTS = 24, 192  # more inputs than a block has


def make(seed: int, rank: int = 40) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.05
    mixing = torch.randn(rank, INPUTS, generator=generator)
    x_NI = torch.randn(512, rank, generator=generator) @ mixing + 0.3 * torch.randn(512, INPUTS, generator=generator)
    x_NI *= torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=generator)]
    return weight_OI, x_NI.T @ x_NI


def error(weight_OI: Tensor, quantized: Quantized, gram_II: Tensor) -> float:
    change = weight_OI.double() - quantized.values().double()
    return float((change @ gram_II.double() * change).sum())


def twin(
    weight_OI: Tensor, gram_II: Tensor, grid: IntegerGrid, scales_OG: Tensor, damping: float, act_order: bool
) -> Tensor:
    """The codes: after each input the inverse of what is left is made by elimination (Optimal Brain Quantization)."""
    gram = gram_II.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    inverse, left = torch.linalg.inv(gram), weight_OI.double().clone()
    scale_OI = scales_OG.double().repeat_interleave(INPUTS // scales_OG.shape[1], 1)
    order = torch.argsort(gram_II.diagonal(), descending=True, stable=True) if act_order else torch.arange(INPUTS)
    codes = torch.zeros(OUTPUTS, INPUTS)
    for at in order.tolist():
        codes[:, at] = (left[:, at] / scale_OI[:, at]).round().clamp(grid.least, grid.most)
        step = (left[:, at] - codes[:, at] * scale_OI[:, at]) / inverse[at, at]
        left -= step[:, None] * inverse[at]
        inverse -= inverse[:, at : at + 1] @ inverse[at : at + 1] / inverse[at, at]
        inverse[at, at] = 1.0
    return codes


@pytest.mark.parametrize("act_order", [True, False])
def test_the_codes_are_those_of_the_twin(act_order: bool) -> None:
    weight_OI, gram_II = make(0)
    grid = IntegerGrid(4, 32)
    scales_OG = grid.scales(weight_OI)
    order_I = torch.argsort(gram_II.diagonal(), descending=True, stable=True) if act_order else None
    made = _rounded_in_turn(weight_OI, _inverse_factor(gram_II, 0.01, order_I, "a"), grid, scales_OG, order_I)
    expected = twin(weight_OI, gram_II, grid, scales_OG, 0.01, act_order)
    # where fp32 and fp64 round a tie apart, what follows differs: most codes are the same and the error is too
    assert (made.codes_OI == expected).float().mean() > 0.98
    of_twin = Quantized(expected.to(torch.int8), scales_OG)
    assert error(weight_OI, made, gram_II) == pytest.approx(error(weight_OI, of_twin, gram_II), rel=0.02)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("act_order", [True, False])
def test_a_map_loses_less_than_by_plain_rounding(group: int, act_order: bool) -> None:
    weight_OI, gram_II = make(1)
    grid = IntegerGrid(4, group)
    solution = gptq(weight_OI, gram_II, grid, 0.01, act_order, "a")
    plain = rounded(weight_OI, grid.scales(weight_OI), grid)
    assert solution.rounding_error == pytest.approx(error(weight_OI, plain, gram_II), rel=1e-3)
    assert solution.error == pytest.approx(error(weight_OI, solution.quantized, gram_II), rel=1e-3)
    assert solution.error < 0.5 * solution.rounding_error


def test_no_output_is_worse_than_rounded() -> None:
    """With next to no damping and fewer tokens than inputs, some outputs would be."""
    generator = torch.Generator().manual_seed(3)
    weight_OI, x_NI = torch.randn(OUTPUTS, INPUTS, generator=generator), torch.randn(8, INPUTS, generator=generator)
    gram_II, grid = x_NI.T @ x_NI, IntegerGrid(4, 32)
    for damping in (0.01, 100.0):
        solution = gptq(weight_OI, gram_II, grid, damping, True, "a")
        plain = rounded(weight_OI, grid.scales(weight_OI), grid)
        for at in range(OUTPUTS):
            rows = [
                Quantized(one.codes_OI[at : at + 1], one.scales_OG[at : at + 1]) for one in (solution.quantized, plain)
            ]
            mine, of_plain = (error(weight_OI[at : at + 1], row, gram_II) for row in rows)
            assert mine <= of_plain * 1.001 + 1e-4


def test_inputs_that_were_never_there_are_rounded() -> None:
    weight_OI, gram_II = make(4)
    gram_II[:, 7] = gram_II[7] = 0.0
    grid = IntegerGrid(4, 32)
    quantized = gptq(weight_OI, gram_II, grid, 0.01, True, "a").quantized
    nearest = (weight_OI[:, 7] / quantized.scales_OG[:, 0]).round().clamp(grid.least, grid.most)
    assert torch.equal(quantized.codes_OI[:, 7], nearest.to(torch.int8))
    nothing = gptq(weight_OI, torch.zeros_like(gram_II), grid, 0.01, True, "a")
    assert nothing.error == 0.0 and torch.equal(
        nothing.quantized.codes_OI, rounded(weight_OI, grid.scales(weight_OI), grid).codes_OI
    )


def test_sums_that_are_not_finite_are_named() -> None:
    weight_OI, gram_II = make(5)
    gram_II[3, 3] = torch.inf
    with pytest.raises(SelfCheckError, match=r"the inputs of some\.weight are not finite"):
        gptq(weight_OI, gram_II, IntegerGrid(4, 32), 0.01, True, "some.weight")


def test_scales_fitted_to_important_inputs_beat_those_of_the_largest_value() -> None:
    weight_OI, gram_II = make(6)
    grid = IntegerGrid(4, 64)
    importance_I = gram_II.diagonal()

    def weighted(scales_OG: Tensor) -> float:
        values = rounded(weight_OI, scales_OG, grid).values()
        return float(((values - weight_OI).square() * importance_I).sum())

    assert weighted(fitted_scales(weight_OI, importance_I, grid)) < 0.9 * weighted(grid.scales(weight_OI))
