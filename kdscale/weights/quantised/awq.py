"""AWQ as AutoAWQ writes it for its GEMM kernels (arXiv 2306.00978): 4 bits, `qweight`, `qzeros` and `scales`.

A weight is scale * (integer - zero). Integers and zeros are packed along the outputs, eight to a 32-bit word, in the
order that the kernels unpack fastest: from the lowest bits on, outputs 0 2 4 6 1 3 5 7 of the eight.

O outputs · I inputs · G groups
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part, row_by_row, unpack_bits

if TYPE_CHECKING:
    import torch

_BITS, _IN_WORD = 4, 8
_PLACE_OF = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output of eight, counted from the lowest bits of their word
_FLOATS = ("F16", "BF16", "F32")


class Awq(Format):
    """The version `gemm`, with zeros."""

    suffixes: ClassVar[Mapping[str, str]] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    needed = ("qweight", "qzeros", "scales")
    dimensions: ClassVar[Mapping[str, int]] = {"qweight": 2, "qzeros": 2, "scales": 2}

    def __init__(self, settings: Mapping[str, Any], where: str, dtype: str):
        super().__init__({**settings, "version": str(settings.get("version", "gemm")).lower()}, where, dtype)
        self.choice("bits", (_BITS,), _BITS)
        self.choice("version", ("gemm",))

    @property
    def label(self) -> str:
        return f"AWQ, {_BITS} bits, groups of {self.settings.get('group_size', 128)}"

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        return name.removesuffix(".qweight") if name.endswith(".qweight") else None

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        self.dtypes(name, found, {"qweight": ("I32",), "qzeros": ("I32",), "scales": _FLOATS})
        (inputs, words), groups = found["qweight"].entry.shape, found["scales"].entry.shape[0]
        outputs = words * _IN_WORD
        self.fits(name, found, {"scales": (groups, outputs), "qzeros": (groups, words)})
        if inputs % groups:
            raise self.wrong(name, expected="groups of equal size", got=f"{groups} groups of {inputs} inputs")

        def decode(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
            size = inputs // groups

            def rows(first: int, last: int) -> torch.Tensor:
                words = slice(first // _IN_WORD, last // _IN_WORD)
                integers_Io = _outputs(parts["qweight"][:, words])
                integers_Io -= _outputs(parts["qzeros"][:, words]).repeat_interleave(size, dim=0)
                scales_Io = parts["scales"][:, first:last].float().repeat_interleave(size, dim=0)
                return (integers_Io.float() * scales_Io).T

            return row_by_row((outputs, inputs), self.dtype, _IN_WORD, rows)

        return PackedTensor((outputs, inputs), self.dtype, found, decode, (outputs, inputs))


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """[R, W] words → [R, O] integers in the order of the outputs."""
    places = unpack_bits(words, _BITS, words.shape[1] * _IN_WORD).unflatten(1, (-1, _IN_WORD))
    return places[:, :, list(_PLACE_OF)].flatten(1)
