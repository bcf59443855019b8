"""The 4-bit floats of compressed-tensors: NVFP4 and MXFP4 (OCP Microscaling Formats 1.0) of linear maps.

Two numbers lie in a byte, the first in its lower half. A group of inputs shares a scale: 16 and an 8-bit float, over a
scale of the whole matrix (NVFP4), or 32 and a power of two (MXFP4).

O outputs · I inputs · G groups
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.mxfp4 import E2M1
from kdscale.weights.quantised.packed import PackedTensor, Part

if TYPE_CHECKING:
    import torch

_BIAS = 127


def float4_matrix(form: Format, name: str, found: Mapping[str, Part]) -> PackedTensor:
    """The matrix `name` from `packed`, `scale` and (NVFP4) `global`. Raises CheckpointError."""
    form.dtypes(name, found, {"scale": ("F8_E4M3", "U8"), "global": ("F32",)})
    packed, scale = found["packed"].entry.shape, found["scale"].entry
    if len(packed) != 2 or len(scale.shape) != 2:
        raise form.wrong(name, expected="a matrix", got=f"shape {list(packed)}, scales {list(scale.shape)}")
    outputs, inputs = packed[0], 2 * packed[1]
    powers = scale.dtype == "U8"
    size = 32 if powers else 16
    form.fits(name, found, {"scale": (outputs, inputs // size), "global": (1,)})
    if powers == ("global" in found) or inputs % size:
        expected = "a scale of the matrix beside 8-bit float scales, or scales that are powers of two"
        raise form.wrong(name, expected=expected, got=f"{scale.dtype} scales for groups of {size} of {inputs} inputs")
    parts = {
        "packed": Part(found["packed"].name, found["packed"].entry, 1),
        "scale": Part(found["scale"].name, scale, 1),
    }
    if not powers:
        parts["global"] = found["global"]

    def decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        table, bytes_Oi = torch.tensor(E2M1), read["packed"].int()
        codes_OI = torch.stack((table[bytes_Oi & 0xF], table[bytes_Oi >> 4]), dim=-1).flatten(-2)
        scales_OG = read["scale"].float()
        scales_OG = (scales_OG - _BIAS).exp2() if powers else scales_OG / read["global"]
        weight_OI: torch.Tensor = (codes_OI.unflatten(-1, (-1, size)) * scales_OG.unsqueeze(-1)).flatten(-2)
        return weight_OI

    return PackedTensor((outputs, inputs), form.dtype, parts, decode, (outputs, inputs))
