"""Weights in 8-bit floats as DeepSeek, Qwen and Mistral publish them: the matrix, and a scale for each block of it.

A weight is its 8-bit float times the scale of its block, of 128 x 128 weights in the models that there are
(DeepSeek-V3, arXiv 2412.19437, section 3.3.2); a matrix that no block divides ends with smaller ones. One scale for a
matrix, or one for each output (fbgemm), are blocks too.

O outputs · I inputs · R C rows and columns of scales
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part

if TYPE_CHECKING:
    import torch

_CODES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_BIAS = 127  # of an exponent that is stored as a plain byte


class Float8(Format):
    """`weight_scale_inv` (a factor, whatever its name says) or `weight_scale` beside the weight."""

    suffixes: ClassVar[Mapping[str, str]] = {"codes": "", "scale_inv": "_scale_inv", "scale": "_scale"}
    needed = ("codes",)

    def __init__(self, settings: Mapping[str, Any], where: str, dtype: str):
        super().__init__(settings, where, dtype)
        self.block: tuple[int, int] | None = None
        if (block := settings.get("weight_block_size")) is not None:
            if not isinstance(block, list) or len(block) != 2 or not all(type(one) is int and one > 0 for one in block):
                self.choice("weight_block_size", ([128, 128],))
            self.block = (block[0], block[1])

    @property
    def label(self) -> str:
        blocks = f", blocks of {self.block[0]} x {self.block[1]}" if self.block else ""
        return f"8-bit floats{blocks}"

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        scaled = any(f"{name}{suffix}" in entries for suffix in ("_scale_inv", "_scale"))
        return name if entries[name].dtype in _CODES and scaled else None

    def plain(self, stem: str) -> str:
        return stem

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        scale = found["scale_inv" if "scale_inv" in found else "scale"]
        self.dtypes(name, {"scale": scale}, {"scale": _SCALES})
        shape = found["codes"].entry.shape
        if len(shape) < 2:
            raise self.wrong(name, expected="a matrix", got=f"shape {list(shape)}")
        block = self._block_of(name, shape, scale.entry.shape)
        rows = block[0] if len(shape) == 2 else 1
        rows = 0 if math.prod(scale.entry.shape) == 1 else rows
        parts = {
            "codes": Part(name, found["codes"].entry, 1),
            "scale": Part(scale.name, scale.entry, rows),
        }

        def decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
            codes, scales = read["codes"].float(), _factors(read["scale"])
            if scales.numel() > 1:
                scales = scales.reshape(*codes.shape[:-2], -1, -(-shape[-1] // block[1]))
                scales = scales.repeat_interleave(block[0], dim=-2)[..., : codes.shape[-2], :]
                scales = scales.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]
            return codes * scales.reshape((1,) * codes.ndim if scales.numel() == 1 else scales.shape)

        return PackedTensor(shape, self.dtype, parts, decode, shape)

    def _block_of(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """How many outputs and inputs share a scale: as config.json says, or as the number of scales does."""
        outputs, inputs = shape[-2:]
        leading = shape[:-2]
        if math.prod(scales) == 1:
            return outputs, inputs
        if self.block is not None:
            size = self.block
            if scales == (*leading, -(-outputs // size[0]), -(-inputs // size[1])):
                return size
        if scales in ((*leading, outputs), (*leading, outputs, 1)):
            return 1, inputs
        if leading and scales in (leading, (*leading, 1, 1)):
            return outputs, inputs
        rows, columns = scales[-2:] if len(scales) == len(shape) else (0, 0)
        if self.block is None and rows and columns and not outputs % rows and not inputs % columns:
            return outputs // rows, inputs // columns
        said = f"blocks of {list(self.block)}" if self.block else "blocks that divide it"
        raise self.wrong(name, expected=f"scales for {said} of {list(shape)}", got=f"scales {list(scales)}")


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; those that are stored as bytes are powers of two."""
    import torch

    return (scales.float() - _BIAS).exp2() if scales.dtype == torch.uint8 else scales.float()
