"""The integers that a quantised weight is stored as, and the grid of values that they stand for.

The one definition of the grid: what a quantised model holds and what training with fake quantisation computes with.
It is the grid of the compressed-tensors format for symmetric integers (its `calculate_qparams`).

O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntegerGrid:
    """Symmetric integers of `bits` bits with a scale for each `group` inputs of a row, or (None) for each row."""

    bits: int
    group: int | None = None

    @property
    def least(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def most(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1

    def divides(self, inputs: int) -> bool:
        """Whether rows of so many inputs can be cut into groups."""
        return self.group is None or inputs % self.group == 0

    def scales(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """[O, G] in the weight's dtype: a group's largest magnitude is half the range of the integers."""
        largest_OG = self._grouped(weight_OI).abs().amax(dim=-1).float()
        scales_OG = (largest_OG / ((self.most - self.least) / 2)).to(weight_OI.dtype)
        smallest = torch.finfo(weight_OI.dtype).eps  # of a group of zeros, which nothing can be divided by
        return torch.where(scales_OG == 0, smallest, scales_OG)

    def integers(self, weight_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
        """[O, I] in fp32: the integers whose values are nearest to the weight's; halves go to the even one."""
        scaled_OGi = self._grouped(weight_OI).float() / scales_OG.float().unsqueeze(-1)
        return scaled_OGi.clamp_(self.least, self.most).round_().flatten(-2)

    def values(self, integers_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
        """[O, I]: the weight that readers of the format compute, in the dtype of the scales as they do."""
        integers_OGi = self._grouped(integers_OI).to(scales_OG.dtype)
        return (integers_OGi * scales_OG.unsqueeze(-1)).flatten(-2)

    def nearest(self, weight_OI: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
        """[O, I] in the weight's dtype: its values once it has been stored in `stored` and then quantised."""
        as_stored_OI = weight_OI.to(stored)
        scales_OG = self.scales(as_stored_OI)
        return self.values(self.integers(as_stored_OI, scales_OG), scales_OG).to(weight_OI.dtype)

    def _grouped(self, values_OI: torch.Tensor) -> torch.Tensor:
        """[O, G, inputs of a group]."""
        return values_OI.unflatten(-1, (-1, self.group or values_OI.shape[-1]))
