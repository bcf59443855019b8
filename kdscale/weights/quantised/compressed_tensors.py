"""The compressed-tensors format of llm-compressor and vLLM: packed integers, plain 8-bit integers, 8-bit floats.

A weight is scale * (code - zero). Of a matrix there is one scale, or one for each output, each group of inputs of an
output, or each block; zeros (of asymmetric integers) go with the scales. Packed integers lie in 32-bit words along the
inputs, their zeros along the outputs, the lowest bits first, half the range added so that they have no sign. 4-bit
floats are in compressed_float4.

O outputs · I inputs · G groups · W words
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kdscale.errors import CheckpointError
from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.compressed_float4 import float4_matrix
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part, unpack_bits
from kdscale.weights.tensor_bytes import read_rows

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]  # along the outputs, along the inputs
_WORD = 32
_PACKED = "pack-quantized"
_FLOAT4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
_KNOWN = (_PACKED, "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense", *_FLOAT4)
_CODES = ("I8", "F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "F16", "BF16")


class CompressedTensors(Format):
    """All formats of `_KNOWN`; which one a matrix is in, its own tensors tell."""

    suffixes: ClassVar[Mapping[str, str]] = {
        "packed": "_packed", "codes": "", "scale": "_scale", "shape": "_shape", "zero": "_zero_point",
        "g_idx": "_g_idx", "global": "_global_scale",
    }  # fmt: skip
    needed = ("scale",)

    def __init__(self, settings: Mapping[str, Any], where: str, dtype: str):
        super().__init__(settings, where, dtype)
        self.format = self.choice("format", _KNOWN, "dense")
        groups = settings.get("config_groups")
        self.groups = list(groups.values()) if isinstance(groups, dict) else []
        for group in self.groups:
            own = group.get("format") if isinstance(group, dict) else None
            if not isinstance(group, dict) or (own is not None and own not in _KNOWN):
                self._refuse("config_groups", "formats " + ", ".join(_KNOWN), group)
        # a sparse or a rotated model is not the matrices that its files hold
        for field in ("sparsity_config", "transform_config"):
            value = settings.get(field)
            if value and not (isinstance(value, dict) and value.get("format") in ("dense", None) and _is_empty(value)):
                self._refuse(field, "none", value)

    def _refuse(self, field: str, expected: str, got: Any) -> None:
        raise CheckpointError(
            f"{self.where}: quantization_config.{field}", expected=expected, got=repr(got)[:200],
            hint="use the checkpoint before it was quantised",
        )  # fmt: skip

    @property
    def label(self) -> str:
        said = [_scheme(group.get("weights")) for group in self.groups]
        return ", ".join(["compressed-tensors", str(self.format), *dict.fromkeys(filter(None, said))])

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        if name.endswith("_packed") and entries[name].dtype in ("I32", "U8"):
            return name.removesuffix("_packed")
        return name if entries[name].dtype in _CODES and f"{name}_scale" in entries else None

    def plain(self, stem: str) -> str:
        return stem

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        if "packed" in found and found["packed"].entry.dtype == "U8":
            return float4_matrix(self, name, found)
        zeros = ("I32",) if "packed" in found else _CODES
        self.dtypes(name, found, {"codes": _CODES, "scale": _FLOATS, "zero": zeros, "g_idx": ("I32", "I64")})
        codes = found["packed" if "packed" in found else "codes"].entry.shape
        shape = self._shape(name, found) if "packed" in found else codes
        if len(shape) != 2 or len(codes) != 2 or codes[0] != shape[0]:
            raise self.wrong(name, expected="a matrix", got=f"shape {list(shape)} in codes {list(codes)}")
        bits = self._bits(name, codes[1], shape[1]) if "packed" in found else 8
        grid, block = self._grid(name, found["scale"].entry.shape, shape)
        parts = self._parts(name, found, grid, block, bits)

        def decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
            codes_OI = _codes(read, bits, shape[1])
            scale_OG, zero_OG = read["scale"].float().reshape(-1, grid[1]), None
            if "zero" in read:
                zero_OG = _zeros(read, bits, len(scale_OG)).float().reshape(-1, grid[1])
            rows = range(len(codes_OI))
            spread = lambda values_OG: _spread(values_OG, rows, shape[1], block, read.get("g_idx"))  # noqa: E731
            shifted_OI = codes_OI if zero_OG is None else codes_OI - spread(zero_OG)
            weight_OI: torch.Tensor = shifted_OI * spread(scale_OG)
            return weight_OI

        return PackedTensor(shape, self.dtype, parts, decode, shape)

    def _shape(self, name: str, found: Mapping[str, Part]) -> tuple[int, ...]:
        if "shape" not in found:
            raise self.wrong(name, expected=f"{name}_shape beside {name}_packed", got="none")
        shape = tuple(int(size) for size in read_rows(found["shape"].entry, found["shape"].name).flatten().tolist())
        if any(size < 1 for size in shape):
            raise self.wrong(name, expected="sizes above zero", got=str(list(shape)))
        return shape

    def _bits(self, name: str, words: int, inputs: int) -> int:
        """Bits of a packed integer: those of the scheme that makes as many words of as many inputs."""
        said = {group["weights"].get("num_bits") for group in self.groups if isinstance(group.get("weights"), dict)}
        fitting = [bits for bits in sorted(b for b in said if isinstance(b, int) and 1 <= b <= 8)
                   if math.ceil(inputs * bits / _WORD) == words]  # fmt: skip
        if len(fitting) != 1:
            raise self.wrong(
                name, expected=f"{words} words for {inputs} inputs of as many bits as one of config_groups says",
                got=f"num_bits {', '.join(map(str, said)) or 'nowhere'}",
            )  # fmt: skip
        return fitting[0]

    def _grid(self, name: str, scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Pair, Pair]:
        """How many rows and columns of scales there are, and how many outputs and inputs share one."""
        outputs, inputs = shape
        if math.prod(scales) == 1:
            return (1, 1), (outputs, inputs)
        if len(scales) == 1 and scales[0] == outputs:
            scales = (outputs, 1)
        for block in self._blocks(inputs):
            if scales == (-(-outputs // block[0]), -(-inputs // block[1])):
                return (scales[0], scales[1]), block
        raise self.wrong(
            name, expected=f"scales that divide {list(shape)} as config_groups says", got=str(list(scales))
        )

    def _blocks(self, inputs: int) -> Iterator[Pair]:
        """How many outputs and inputs share a scale in each of config_groups."""
        for weights in (group["weights"] for group in self.groups if isinstance(group.get("weights"), dict)):
            size, block = weights.get("group_size"), weights.get("block_structure")
            if type(size) is int and size > 0:
                yield 1, size
            elif isinstance(block, list) and len(block) == 2 and all(type(one) is int and one > 0 for one in block):
                yield block[0], block[1]
            else:
                yield 1, inputs

    def _parts(self, name: str, found: Mapping[str, Part], grid: Pair, block: Pair, bits: int) -> dict[str, Part]:
        """The parts that decoding reads, with how many rows of the matrix a row of each stands for."""
        rows = {"packed": 1, "codes": 1, "scale": block[0] if grid[0] > 1 else 0, "g_idx": 0}
        if "zero" in found:
            zeros = found["zero"].entry.shape
            if "packed" in found:  # whole words of zeros
                self.fits(name, found, {"zero": (math.ceil(grid[0] * bits / _WORD), grid[1])})
                rows["zero"] = _WORD // bits if _WORD % bits == 0 else 0
                if not rows["zero"]:
                    rows = dict.fromkeys(rows, 0)
            elif math.prod(zeros) != math.prod(grid):
                raise self.wrong(name, expected=f"as many zeros as scales {list(grid)}", got=str(list(zeros)))
            else:
                rows["zero"] = rows["scale"]
        ordered = ("packed", "codes", "scale", "zero", "g_idx")
        return {
            key: Part(found[key].name, found[key].entry, rows[key])
            for key in ordered
            if key in found and not (key == "codes" and "packed" in found)
        }


def _codes(read: Mapping[str, torch.Tensor], bits: int, inputs: int) -> torch.Tensor:
    if "packed" in read:
        return (unpack_bits(read["packed"], bits, inputs) - (1 << bits - 1)).float()
    return read["codes"].float()


def _zeros(read: Mapping[str, torch.Tensor], bits: int, scales: int) -> torch.Tensor:
    if "packed" in read:
        return unpack_bits(read["zero"].T, bits, scales).T - (1 << bits - 1)
    return read["zero"]


def _spread(
    values_OG: torch.Tensor, rows: range, inputs: int, block: Pair, group_I: torch.Tensor | None
) -> torch.Tensor:
    """[O, I]: for each weight its scale or its zero."""
    if values_OG.numel() == 1:
        return values_OG
    if len(values_OG) > 1 and block[0] > 1:
        values_OG = values_OG.repeat_interleave(block[0], dim=0)[: len(rows)]
    if values_OG.shape[1] == 1:
        return values_OG
    if group_I is not None and int(group_I.min()) >= 0:  # -1 where there is no order of its own
        return values_OG[:, group_I.long()]
    return values_OG.repeat_interleave(block[1], dim=1)[:, :inputs]


def _is_empty(value: Mapping[str, Any]) -> bool:
    return not value.get("config_groups")


def _scheme(weights: Any) -> str:
    """What config.json says of the weights of one group."""
    if not isinstance(weights, dict):
        return ""
    kind = "floats" if weights.get("type") == "float" else "integers"
    size = weights.get("group_size")
    shared = (
        f"groups of {size}"
        if weights.get("strategy") in ("group", "tensor_group")
        else f"a scale per {weights.get('strategy')}"
    )
    return f"{weights.get('num_bits')}-bit {kind}, {shared}"
