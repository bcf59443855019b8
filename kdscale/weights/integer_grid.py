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

    @property
    def half_range(self) -> float:
        """How many steps of a scale there are from zero to a group's largest magnitude."""
        return (self.most - self.least) / 2

    def divides(self, inputs: int) -> bool:
        """Whether rows of so many inputs can be cut into groups."""
        return self.group is None or inputs % self.group == 0

    def scales(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """[O, G] in the weight's dtype: a group's largest magnitude is half the range of the integers."""
        largest_OG = self._grouped(weight_OI).abs().amax(dim=-1).float()
        scales_OG = (largest_OG / self.half_range).to(weight_OI.dtype)
        smallest = torch.finfo(weight_OI.dtype).eps  # of a group of zeros, which nothing can be divided by
        return torch.where(scales_OG == 0, smallest, scales_OG)

    def integers(self, weight_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
        """[O, I] in fp32: the integers whose values are nearest to the weight's; halves go to the even one."""
        scaled_OGi = self._grouped(weight_OI).float() / scales_OG.float().unsqueeze(-1)
        scaled_OGi.clamp_(min=self.least_with(scales_OG).unsqueeze(-1)).clamp_(max=self.most)
        return scaled_OGi.round_().flatten(-2)

    def usable(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest scales that a weight may be stored with: here all."""
        return scales

    def least_with(self, scales: torch.Tensor) -> torch.Tensor:
        """The smallest integer, in fp32, that weights with these scales may have, in their shape."""
        return torch.full_like(scales, self.least, dtype=torch.float32)

    @staticmethod
    def values(integers_OI: torch.Tensor, scales_OG: torch.Tensor) -> torch.Tensor:
        """[O, I]: the weight that readers of the format compute, in the scales' dtype and rounded to it as theirs is.

        Each of the G scales of a row is for as many inputs.
        """
        integers_OGi = integers_OI.unflatten(-1, (scales_OG.shape[-1], -1)).to(scales_OG.dtype)
        return (integers_OGi * scales_OG.unsqueeze(-1)).flatten(-2)

    def nearest(self, weight_OI: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
        """[O, I] in the weight's dtype: its values once it has been stored in `stored` and then quantised."""
        as_stored_OI = weight_OI.to(stored)
        scales_OG = self.scales(as_stored_OI)
        return self.values(self.integers(as_stored_OI, scales_OG), scales_OG).to(weight_OI.dtype)

    def _grouped(self, values_OI: torch.Tensor) -> torch.Tensor:
        """[O, G, inputs of a group]."""
        return values_OI.unflatten(-1, (-1, self.group or values_OI.shape[-1]))


class ReachableGrid(IntegerGrid):
    """What of a grid weights can be rounded to when each group has the scale of its largest magnitude.

    Not all of it, as magnitudes are rounded too. Some scales are no magnitude's; and where rounding made a magnitude
    smaller than half the range of its scale, no weight is as low as the smallest integer.
    """

    def largest(self, scales: torch.Tensor) -> torch.Tensor:
        """The magnitude of a group that has such a scale."""
        return (scales.float() * self.half_range).to(scales.dtype)

    def usable(self, scales: torch.Tensor) -> torch.Tensor:
        """The nearest scales that a group's largest magnitude can have."""
        return (self.largest(scales).float() / self.half_range).to(scales.dtype)

    def least_with(self, scales: torch.Tensor) -> torch.Tensor:
        """What the largest magnitude is rounded to, where it is of a negative weight."""
        return (-self.largest(scales).float() / scales.float()).clamp_(min=self.least).round_()
