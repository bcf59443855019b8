"""What a training with rounded weights begins with, beside what its grid makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdscale.quantize.forms import Quantized
from kdscale.quantize.gptq import gptq
from kdscale.quantize.start import weights_in_cells
from kdscale.weights.integer_grid import IntegerGrid, ReachableGrid

OUTPUTS, INPUTS = 96, 128


def solved(dtype: torch.dtype, group: int, seed: int) -> tuple[Tensor, Tensor, Quantized, float]:
    """A weight, the Gram matrix of correlated inputs, and GPTQ's result with its share of plain rounding's error."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = (torch.randn(OUTPUTS, INPUTS, generator=generator) * 0.05).to(dtype)
    mixing = torch.randn(40, INPUTS, generator=generator)
    x_NI = torch.randn(512, 40, generator=generator) @ mixing + 0.3 * torch.randn(512, INPUTS, generator=generator)
    gram_II = x_NI.T @ x_NI
    solution = gptq(weight_OI, gram_II, ReachableGrid(4, group), 0.01, True, "a")
    return weight_OI, gram_II, solution.quantized, solution.error / solution.rounding_error


@pytest.mark.parametrize(("dtype", "group"), [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float32, 32)])
def test_the_trainings_grid_makes_of_it_what_gptq_made(dtype: torch.dtype, group: int) -> None:
    weight_OI, gram_II, quantized, share = solved(dtype, group, seed=group)
    start_OI = weights_in_cells(quantized, ReachableGrid(4, group))
    nearest_OI = IntegerGrid(4, group).nearest(start_OI.float(), dtype)
    values_OI = quantized.values().float()
    other_OG = (nearest_OI != values_OI).view(OUTPUTS, -1, group).any(-1)
    assert start_OI.dtype == dtype and other_OG.float().mean() < 0.03

    def error(made_OI: Tensor) -> float:
        change = made_OI.double() - weight_OI.double()
        return float((change @ gram_II.double() * change).sum())

    assert error(nearest_OI) < 1.1 * error(values_OI) and share < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_has_its_scale_and_its_largest_integer_again(dtype: torch.dtype) -> None:
    """For every scale between 1/64 and 1/2; a group that rises to 7, and one that falls as low as it can."""
    every = torch.arange(1 << 15, dtype=torch.int16).view(dtype)
    every_S1 = every[(every >= 1 / 64) & (every < 1 / 2)][:, None]
    grid, own = IntegerGrid(4, 32), ReachableGrid(4, 32)
    scales_S1 = own.usable(every_S1)
    assert torch.equal(own.usable(scales_S1), scales_S1)
    assert 0.9 < (scales_S1 == every_S1).float().mean() < 1.0
    assert ((scales_S1.float() / every_S1.float()).log2().abs() < 2 * torch.finfo(dtype).eps).all()
    least_S1 = own.least_with(scales_S1)
    assert set(least_S1.unique().tolist()) == {-8.0, -7.0}
    middle_SI = torch.arange(-6, 7).repeat(len(every_S1), 3)[:, :31]
    for edge_S1 in (torch.full_like(least_S1, 7), least_S1):
        quantized = Quantized(torch.cat([middle_SI, edge_S1], 1).to(torch.int8), scales_S1)
        assert torch.equal(grid.nearest(weights_in_cells(quantized, own), dtype), quantized.values())


@pytest.mark.parametrize(("codes", "most"), [([0] * 32, 0.0), ([6, -2] * 16, 2.0), ([-5, 1] + [0] * 30, 0.5)])
def test_a_group_whose_integers_stop_short_changes_little(codes: list[int], most: float) -> None:
    """In squared steps of its scale: no more than raising its largest to the grid's would, or a smaller scale."""
    quantized = Quantized(torch.tensor([codes], dtype=torch.int8), torch.full((1, 1), 0.03, dtype=torch.bfloat16))
    start = weights_in_cells(quantized, ReachableGrid(4, 32))
    change = (IntegerGrid(4, 32).nearest(start, start.dtype).float() - quantized.values().float()) / 0.03
    assert float(change.square().sum()) <= most


def test_without_such_a_grid_gptq_has_scales_and_integers_that_are_lost() -> None:
    weight_OI = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16()
    grid = IntegerGrid(4, 64)
    quantized = gptq(weight_OI, torch.eye(128), grid, 0.01, True, "a").quantized
    start_OI = weights_in_cells(quantized, ReachableGrid(4, 64))
    other_OG = (grid.nearest(start_OI, start_OI.dtype) != quantized.values()).view(64, -1, 64).any(-1)
    assert other_OG.float().mean() > 0.1
