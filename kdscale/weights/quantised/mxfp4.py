"""MXFP4 as gpt-oss is published (OCP Microscaling Formats 1.0): `_blocks` of 4-bit floats, `_scales` of exponents.

32 numbers of a row share a power of two; two lie in a byte, the first in its lower half. transformers has the matrices
of experts the other way round, [experts, inputs, outputs], and so have checkpoints that are not quantised.

E experts · R outputs · C inputs · B blocks of an output, 32 inputs each
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BYTES, _BIAS = 16, 127


class Mxfp4(Format):
    """The experts of a mixture, all of a layer in one tensor."""

    suffixes: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "scales": "_scales"}
    needed = ("blocks", "scales")
    dimensions: ClassVar[Mapping[str, int]] = {"blocks": 4, "scales": 3}

    @property
    def label(self) -> str:
        return "MXFP4, 4-bit floats in blocks of 32"

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        return name.removesuffix("_blocks") if name.endswith("_blocks") and entries[name].dtype == "U8" else None

    def plain(self, stem: str) -> str:
        return stem

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        self.dtypes(name, found, {"blocks": ("U8",), "scales": ("U8", "F8_E8M0")})
        blocks = found["blocks"].entry.shape
        if blocks[3] != _BYTES:
            raise self.wrong(name, expected="blocks [experts, outputs, blocks, 16]", got=str(list(blocks)))
        self.fits(name, found, {"scales": blocks[:3]})
        shape = (blocks[0], blocks[2] * 2 * _BYTES, blocks[1])
        parts = {key: Part(part.name, part.entry, 1) for key, part in found.items()}
        return PackedTensor(shape, self.dtype, parts, _decode, shape)


def _decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[E, R, B, 16] bytes and [E, R, B] exponents → [E, C, R]."""
    import torch

    table, blocks = torch.tensor(E2M1), read["blocks"]
    exponents = read["scales"].view(torch.uint8).to(torch.int32) - _BIAS
    numbers = torch.stack((table[(blocks & 0xF).int()], table[(blocks >> 4).int()]), dim=-1).flatten(-2)
    return torch.ldexp(numbers, exponents.unsqueeze(-1)).flatten(-2).transpose(1, 2)
