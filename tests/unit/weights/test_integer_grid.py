"""The grid of quantised weights: the one of the compressed-tensors format, to the bit."""

from __future__ import annotations

import pytest
import torch

from kdscale.weights.integer_grid import IntegerGrid


def weights(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(24, 128, generator=generator).to(dtype)
    weight_OI[3, 32:64] = 0.0  # a group that has no magnitude to be scaled by
    weight_OI[5] *= 1e-6
    return weight_OI


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, None), (8, 128)])
def test_scales_integers_and_values_are_those_of_the_format(bits: int, group: int | None, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import calculate_qparams

    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group" if group else "channel", group_size=group
    )
    grid, weight_OI = IntegerGrid(bits, group), weights(dtype)
    grouped_OGi = weight_OI.unflatten(-1, (-1, group or 128))
    scales_OG, zeros_OG = calculate_qparams(grouped_OGi.amin(-1), grouped_OGi.amax(-1), args)
    assert torch.equal(grid.scales(weight_OI), scales_OG)
    integers_OI = forward.quantize(weight_OI.float(), scales_OG.float(), zeros_OG.float(), args)
    assert torch.equal(grid.integers(weight_OI, scales_OG), integers_OI)
    loaded_OI = forward.dequantize(integers_OI, scales_OG, zeros_OG, args)
    assert torch.equal(grid.values(integers_OI, scales_OG), loaded_OI)
    assert torch.equal(grid.nearest(weight_OI.float(), dtype), loaded_OI.float())


def test_no_other_integer_is_nearer() -> None:
    grid, weight_OI = IntegerGrid(4, 32), weights(torch.float64)
    scales_OG = grid.scales(weight_OI)
    every_n = torch.arange(grid.least, grid.most + 1, dtype=torch.float64)
    points_OIn = scales_OG.repeat_interleave(32, dim=1).unsqueeze(-1) * every_n
    nearest_OI = (points_OIn - weight_OI.unsqueeze(-1)).abs().amin(-1)
    found_OI = (grid.nearest(weight_OI, torch.float64) - weight_OI).abs()
    assert torch.allclose(found_OI, nearest_OI, atol=1e-6 * float(scales_OG.max()))
    assert float((found_OI / scales_OG.repeat_interleave(32, dim=1)).max()) <= 0.5 + 1e-6
    assert grid.integers(weight_OI, scales_OG).unique().tolist() == every_n.tolist()  # none of them is wasted


def test_a_group_divides_rows_or_does_not() -> None:
    assert IntegerGrid(4, 32).divides(96) and not IntegerGrid(4, 64).divides(96) and IntegerGrid(8).divides(97)
