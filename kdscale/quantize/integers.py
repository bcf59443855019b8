"""Weights as integers of 4 or 8 bits, symmetric around zero: `pack-quantized` in compressed-tensors, in int32 words.

Activations stay as they are. Serving engines take weight-only integers in this format alone, 8 bits too.

O outputs · I inputs · G groups
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdscale.config.quantize import FormConfig
from kdscale.quantize.forms import Form, Quantized, scale_name
from kdscale.weights import TensorInfo
from kdscale.weights.integer_grid import IntegerGrid

_WORD_BITS = 32


def rounded(weight_OI: Tensor, scales_OG: Tensor, grid: IntegerGrid) -> Quantized:
    """Every value to the nearest of the grid with these scales."""
    return Quantized(grid.integers(weight_OI, scales_OG).to(torch.int8), scales_OG)


class IntegerForm(Form):
    """Integers in packed words."""

    file_format = "pack-quantized"

    def __init__(self, settings: FormConfig):
        super().__init__(settings)
        self.grid = IntegerGrid(settings.bits, settings.group_size)

    def round(self, weight_OI: Tensor) -> Quantized:
        return rounded(weight_OI, self.grid.scales(weight_OI), self.grid)

    def scheme(self) -> dict[str, Any]:
        group = self.settings.group_size
        return {
            "targets": ["Linear"],
            "weights": {
                "num_bits": self.settings.bits, "type": "int", "symmetric": True,
                "strategy": "channel" if group is None else "group", "group_size": group,
            },
        }  # fmt: skip

    def tensors(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        outputs, inputs = info.shape
        words = math.ceil(inputs * self.settings.bits / _WORD_BITS)
        return {
            f"{name}_packed": TensorInfo((outputs, words), "I32"),
            scale_name(name): TensorInfo((outputs, inputs // (self.settings.group_size or inputs)), info.dtype),
            f"{name}_shape": TensorInfo((2,), "I64"),
        }

    def encode(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        return {
            f"{name}_packed": pack_to_int32(quantized.codes_OI.cpu(), self.settings.bits),
            scale_name(name): quantized.scales_OG.cpu(),
            f"{name}_shape": torch.tensor(quantized.codes_OI.shape),
        }
