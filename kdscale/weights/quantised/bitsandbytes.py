"""bitsandbytes: LLM.int8 (arXiv 2208.07339), and NF4 and FP4 of QLoRA (arXiv 2305.14314) with their nested scales.

int8: a weight is its integer times the largest magnitude of its output (`SCB`), through 127. 4 bits: a weight is the
number of a table (`quant_map`) that its 4 bits choose, times the largest magnitude of its block (`absmax`); two lie in
a byte, the first in its upper half. Nested, the magnitudes are themselves numbers of a table, times the magnitude of
their own blocks, around a mean that the quant_state tells.

O outputs · I inputs · N weights in storage order · B blocks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from kdscale.errors import CheckpointError
from kdscale.files import parse_json
from kdscale.weights.header import TensorEntry
from kdscale.weights.quantised.format import Format
from kdscale.weights.quantised.packed import PackedTensor, Part, row_by_row
from kdscale.weights.tensor_bytes import read_rows

if TYPE_CHECKING:
    import torch

_STEP = 7.874015718698502e-3  # 1 / 127, which bitsandbytes multiplies by
_STATES = {"nf4": ".weight.quant_state.bitsandbytes__nf4", "fp4": ".weight.quant_state.bitsandbytes__fp4"}


class BitsAndBytes(Format):
    """Either of the two; which one a matrix is in, its own tensors tell."""

    suffixes: ClassVar[Mapping[str, str]] = {
        "codes": ".weight", "rows": ".SCB", "absmax": ".weight.absmax", "table": ".weight.quant_map",
        "nested_absmax": ".weight.nested_absmax", "nested_table": ".weight.nested_quant_map", **_STATES,
    }  # fmt: skip
    needed = ("codes",)
    dimensions: ClassVar[Mapping[str, int]] = {"codes": 2, "rows": 1, "absmax": 1, "table": 1}

    @property
    def label(self) -> str:
        if self.settings.get("load_in_4bit"):
            nested = ", nested scales" if self.settings.get("bnb_4bit_use_double_quant") else ""
            return f"bitsandbytes, 4-bit {self.settings.get('bnb_4bit_quant_type', 'nf4')}{nested}"
        return "bitsandbytes, 8-bit integers"

    def stem(self, name: str, entries: Mapping[str, TensorEntry]) -> str | None:
        stem = name.removesuffix(".weight")
        marked = f"{stem}.SCB" in entries or f"{name}.absmax" in entries
        return stem if name.endswith(".weight") and marked else None

    def packed(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        if "rows" in found:
            return self._integers(name, found)
        return self._table(name, found)

    def _integers(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        self.dtypes(name, found, {"codes": ("I8",), "rows": ("F32",)})
        shape = found["codes"].entry.shape
        self.fits(name, found, {"rows": shape[:1]})
        parts = {key: Part(found[key].name, found[key].entry, 1) for key in ("codes", "rows")}

        def decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return read["codes"].float() * read["rows"].unsqueeze(1) * _STEP

        return PackedTensor(shape, self.dtype, parts, decode, shape)

    def _table(self, name: str, found: Mapping[str, Part]) -> PackedTensor:
        state = self._state(name, found)
        shape, block = tuple(state["shape"]), state["blocksize"]
        values, nested = math.prod(shape), "nested_absmax" in found
        self.dtypes(name, found, {"codes": ("U8",), "absmax": ("U8",) if nested else ("F32",), "table": ("F32",)})
        if math.prod(found["codes"].entry.shape) != -(-values // 2):
            raise self.wrong(name, expected=f"{-(-values // 2):,} bytes for {list(shape)}", got="another number")
        blocks = -(-values // block)
        self.fits(name, found, {"absmax": (blocks,), "table": (16,), "nested_table": (256,)})
        if nested:
            outer = state.get("nested_blocksize"), state.get("nested_offset")
            if "nested_table" not in found or type(outer[0]) is not int or outer[0] < 1 or type(outer[1]) is not float:
                raise self.wrong(name, expected="nested_quant_map, nested_blocksize and nested_offset", got=str(outer))
            self.fits(name, found, {"nested_absmax": (-(-blocks // outer[0]),)})
        parts = {key: part for key, part in found.items() if key not in _STATES}

        def decode(read: Mapping[str, torch.Tensor]) -> torch.Tensor:
            import torch

            bytes_n, absmax_B = read["codes"].flatten(), read["absmax"]
            if nested:
                own_B = read["nested_absmax"].repeat_interleave(state["nested_blocksize"])[:blocks]
                absmax_B = read["nested_table"][absmax_B.int()] * own_B + state["nested_offset"]

            def pairs(first: int, last: int) -> torch.Tensor:
                """Pairs of blocks: each begins with a byte of its own, and the last may be short."""
                some_n = bytes_n[first * block : last * block].int()
                numbers_N = read["table"][torch.stack((some_n >> 4, some_n & 0xF), dim=-1).flatten()]
                scales_N = absmax_B[2 * first : 2 * last].repeat_interleave(block)[: len(numbers_N)]
                numbers_N = numbers_N[: len(scales_N)] * scales_N
                missing = (last - first) * 2 * block - len(numbers_N)
                return torch.nn.functional.pad(numbers_N, (0, missing)).view(last - first, 2 * block)

            whole = row_by_row((-(-blocks // 2), 2 * block), self.dtype, 1, pairs)
            return whole.flatten()[:values].reshape(shape)

        return PackedTensor(shape, self.dtype, parts, decode, shape)

    def _state(self, name: str, found: Mapping[str, Part]) -> dict[str, Any]:
        """What bitsandbytes wrote of the matrix, as JSON in a tensor of bytes. Raises CheckpointError."""
        kind = next((key for key in _STATES if key in found), None)
        if kind is None or "absmax" not in found or "table" not in found:
            raise self.wrong(
                name, expected="absmax, quant_map and quant_state.bitsandbytes__nf4 or __fp4", got="not all"
            )
        text = bytes(read_rows(found[kind].entry, found[kind].name).flatten().tolist())
        state = parse_json(text.decode("utf-8", errors="replace"), found[kind].name, CheckpointError, expect=dict)
        shape, block = state.get("shape"), state.get("blocksize")
        counts = [*shape, block] if isinstance(shape, list) and shape else [0]
        if not all(type(count) is int and count > 0 for count in counts):
            raise self.wrong(name, expected="a shape and a blocksize in its quant_state", got=repr(state)[:200])
        return dict(state)
