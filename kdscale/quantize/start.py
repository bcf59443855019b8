"""What a training with rounded weights begins with: GPTQ's result, as weights that the training's grid rounds to it.

The training takes a group's scale from its largest weight. So the weights stand in the middle of GPTQ's cells but for
one of each group, whose magnitude gives the group its scale.

O outputs · I inputs · G groups, of i inputs each
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kdscale.config.quantize import FormConfig
from kdscale.files import write_json
from kdscale.quantize.forms import Quantized
from kdscale.quantize.integers import IntegerForm
from kdscale.weights import Checkpoint, TensorInfo, copy_sidecars
from kdscale.weights.integer_grid import ReachableGrid


def weights_in_cells(quantized: Quantized, grid: ReachableGrid) -> Tensor:
    """[O, I] in the dtype of the scales: weights whose nearest values of the grid are those of `quantized`.

    The largest integer of a group has the magnitude of the group's scale. Where it is smaller than the grid's largest,
    it would be rounded up: such a group gets that, or a smaller scale, whichever changes its values least.
    """
    scales_OG = quantized.scales_OG
    values_OGi = quantized.values().unflatten(-1, (scales_OG.shape[1], -1))
    codes_OGi = quantized.codes_OI.view(values_OGi.shape)
    highest_OG, lowest_OG = codes_OGi.amax(-1), codes_OGi.amin(-1)
    above_OG = highest_OG >= -lowest_OG  # a positive one is rounded to the largest integer, wherever exactly it is
    at_OG = torch.where(above_OG, codes_OGi.argmax(-1), codes_OGi.argmin(-1))
    extent_OG = torch.where(above_OG, highest_OG, -lowest_OG).float()
    best_OGi, least_OG = values_OGi, torch.full_like(extent_OG, torch.inf)
    for share_OG in (torch.ones_like(extent_OG), extent_OG / grid.most, extent_OG / -grid.least):
        largest_OG = grid.largest(grid.usable((scales_OG.float() * share_OG).to(scales_OG.dtype)))
        limit_OG1 = largest_OG[:, :, None]
        signed_OG = torch.where(above_OG, largest_OG, -largest_OG)
        weights_OGi = values_OGi.clamp(-limit_OG1, limit_OG1).scatter(-1, at_OG[:, :, None], signed_OG[:, :, None])
        nearest_OI = grid.nearest(weights_OGi.flatten(-2), scales_OG.dtype)
        change_OG = (nearest_OI.view(values_OGi.shape).float() - values_OGi.float()).square_().sum(-1)
        better_OG = change_OG < least_OG
        best_OGi = torch.where(better_OG[:, :, None], weights_OGi, best_OGi)
        least_OG = torch.where(better_OG, change_OG, least_OG)
    return best_OGi.flatten(-2)


class StartForm(IntegerForm):
    """The student itself, in the dtypes that it has, with such weights."""

    calibrated = True
    grid: ReachableGrid

    def __init__(self, settings: FormConfig):
        super().__init__(settings)
        self.grid = ReachableGrid(settings.bits, settings.group_size)

    def tensors(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        return {name: info}

    def encode(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        return {name: weights_in_cells(quantized, self.grid).cpu()}


def finish_start(student: Checkpoint, out_dir: Path, code: bool) -> None:
    """Put config.json, tokenizer and the like beside the weights."""
    write_json(out_dir / "config.json", student.config)
    copy_sidecars(student.path, out_dir, code=code)
