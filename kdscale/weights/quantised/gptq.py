"""GPTQ as AutoGPTQ and GPTQModel write it (arXiv 2210.17323): `qweight`, `qzeros`, `scales` and `g_idx`.

A weight is scale * (integer - zero), where each group of inputs of an output has a scale and a zero. Integers are
packed into 32-bit words along the inputs, zeros along the outputs, the lowest bits first; 3-bit numbers run over the
ends of words. The first version of the format stores each zero less one.

O outputs · I inputs · G groups · W words
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part, row_by_row, unpack_bits

if TYPE_CHECKING:
    import torch

_WORD = 32
_FLOATS = ("F16", "BF16", "F32")


class Gptq(Format):
    """Both versions of the format, `gptq` and `gptq_v2`; the size of groups is what the file has."""

    suffixes: ClassVar[Mapping[str, str]] = {
        "qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales", "g_idx": ".g_idx",
    }  # fmt: skip
    needed = ("qweight", "qzeros", "scales")
    dimensions: ClassVar[Mapping[str, int]] = {"qweight": 2, "qzeros": 2, "scales": 2, "g_idx": 1}

    def __init__(self, settings: Mapping[str, Any], where: str, dtype: str):
        super().__init__(settings, where, dtype)
        self.bits = self.choice("bits", (2, 3, 4, 8), 4)
        self.version = self.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")

    @property
    def label(self) -> str:
        group = self.settings.get("group_size", 128)
        order = ", inputs in the order of their activations" if self.settings.get("desc_act") else ""
        return f"GPTQ, {self.bits} bits, {'one group' if group == -1 else f'groups of {group}'}{order}"

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        return name.removesuffix(".qweight") if name.endswith(".qweight") else None

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        kinds = {"qweight": ("I32",), "qzeros": ("I32",), "scales": _FLOATS, "g_idx": ("I32", "I64")}
        self.dtypes(name, found, kinds)
        words, outputs = found["qweight"].entry.shape
        bits = self._bits_of(name, found, words)
        inputs, groups = words * _WORD // bits, found["scales"].entry.shape[0]
        zeros = -(-outputs * bits // _WORD)
        self.fits(name, found, {"scales": (groups, outputs), "qzeros": (groups, zeros), "g_idx": (inputs,)})
        if "g_idx" not in found and inputs % groups:
            raise self.wrong(name, expected="groups of equal size, or g_idx", got=f"{groups} groups of {inputs} inputs")
        added, most = int(self.version == "gptq"), (1 << bits) - 1

        def decode(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
            import torch

            zeros_GO = (unpack_bits(parts["qzeros"], bits, outputs) + added) & most
            group_I = parts.get("g_idx", torch.arange(inputs) // (inputs // groups)).long()
            if not 0 <= int(group_I.min()) <= int(group_I.max()) < groups:
                raise self.wrong(name, expected=f"groups 0 to {groups - 1} in g_idx", got="others")

            def rows(first: int, last: int) -> torch.Tensor:
                integers_oI = unpack_bits(parts["qweight"][:, first:last].T, bits, inputs)
                integers_oI -= zeros_GO[:, first:last].T[:, group_I]
                return integers_oI.float() * parts["scales"][:, first:last].float().T[:, group_I]

            return row_by_row((outputs, inputs), self.dtype, 1, rows)

        return PackedTensor((outputs, inputs), self.dtype, found, decode, (outputs, inputs))

    def _bits_of(self, name: str, found: Mapping[str, Part], words: int) -> int:
        """GPTQModel gives single matrices other bits than the config says: how many, g_idx tells by its length."""
        if "g_idx" not in found:
            return int(self.bits)
        inputs = found["g_idx"].entry.shape[0]
        if inputs and words * _WORD % inputs == 0 and words * _WORD // inputs in (2, 3, 4, 8):
            return words * _WORD // inputs
        raise self.wrong(name, expected="words of 2, 3, 4 or 8 bits an input", got=f"{words} words, {inputs} inputs")
