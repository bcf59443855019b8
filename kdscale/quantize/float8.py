"""Weights as 8-bit floats (e4m3) with a scale for each output: `float-quantized` in compressed-tensors.

The format asks readers to round what a linear map reads too, token by token, so that both sides of the product are in
8 bits. GPUs multiply these; elsewhere readers compute with the values.

O outputs · I inputs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdscale.quantize.forms import Form, Quantized, scale_name
from kdscale.weights import TensorInfo

_E4M3 = torch.float8_e4m3fn


class Float8Form(Form):
    """Weights in e4m3, activations rounded by the reader."""

    file_format = "float-quantized"

    def round(self, weight_OI: Tensor) -> Quantized:
        most = torch.finfo(_E4M3).max
        scales_O1 = (weight_OI.float().abs().amax(-1, keepdim=True) / most).to(weight_OI.dtype)
        scales_O1 = torch.where(scales_O1 == 0, torch.ones_like(scales_O1), scales_O1)
        # a scale that was rounded down must not make the largest weight an infinity
        codes_OI = (weight_OI.float() / scales_O1.float()).clamp_(-most, most).to(_E4M3)
        return Quantized(codes_OI, scales_O1)

    def scheme(self) -> dict[str, Any]:
        return {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }  # fmt: skip

    def tensors(self, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        return {name: TensorInfo(info.shape, "F8_E4M3"), scale_name(name): TensorInfo((info.shape[0], 1), info.dtype)}

    def encode(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        return {name: quantized.codes_OI.cpu(), scale_name(name): quantized.scales_OG.cpu()}
