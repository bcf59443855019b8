"""A matrix that a quantised checkpoint keeps as several tensors, read as the plain matrix that they stand for.

Values are computed in fp32 from what is on disk and rounded once, to the dtype that the model computes with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdscale.weights.header import DTYPE_BYTES, TensorEntry
from kdscale.weights.tensor_bytes import read_rows, torch_dtype
from kdscale_launch.watchdog import beat

if TYPE_CHECKING:
    import torch

    Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # parts → the rows that they stand for

_SCRATCH_VALUES = 1 << 22  # of a matrix that are decoded at once


@dataclass(frozen=True)
class Part:
    """One tensor on disk that helps to make a matrix; a row of it stands for `rows` of the matrix, 0: for all."""

    name: str
    entry: TensorEntry
    rows: int = 0


@dataclass(frozen=True)
class PackedTensor:
    """Stands in a checkpoint where a TensorEntry of the plain matrix would: `shape` and `dtype` are the plain one's.

    `whole` is the shape of what `decode` gives for all rows; `first` is the number of the value of it that this tensor
    begins with, where it is only a piece.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, Part]
    decode: Decode
    whole: tuple[int, ...]
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the plain matrix."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def file(self) -> Path:
        """The file of its first part."""
        return next(iter(self.parts.values())).entry.file

    @property
    def begin(self) -> int:
        """Where its first part begins in that file."""
        return next(iter(self.parts.values())).entry.begin

    @property
    def row_values(self) -> int:
        """How many values a row has that can be decoded without the other rows; all values where none can."""
        return math.prod(self.whole[1:]) if self._step else math.prod(self.whole)

    @property
    def _step(self) -> int:
        """Rows can be decoded from every multiple of this on; 0 where only all rows can be decoded together."""
        steps = [part.rows for part in self.parts.values() if part.rows]
        return math.lcm(*steps) if steps else 0

    def piece(self, shape: tuple[int, ...], first: int) -> PackedTensor:
        """The values from number `first` on, in storage order, as a tensor of `shape`."""
        return replace(self, shape=shape, first=self.first + first)

    def tensor(self) -> torch.Tensor:
        """All of it."""
        return self.values(0, math.prod(self.shape)).reshape(self.shape)

    def values(self, begin: int, end: int) -> torch.Tensor:
        """Values `begin` to `end` in storage order, flat, in the plain matrix's dtype and memory of their own."""
        begin, end, step = self.first + begin, self.first + end, self._step
        if not step:
            decoded = self._rows(None).to(torch_dtype(self.dtype)).flatten()
            return decoded if end - begin == len(decoded) else decoded[begin:end].clone()
        import torch

        width = math.prod(self.whole[1:])
        first, last = begin // width // step * step, -(-end // width)
        at_once = max(step, _SCRATCH_VALUES // max(1, width) // step * step)
        out = torch.empty(end - begin, dtype=torch_dtype(self.dtype))
        for row in range(first, last, at_once):
            rows = range(row, min(row + at_once, self.whole[0]))
            decoded = self._rows(rows).flatten()
            low, high = max(begin, rows.start * width), min(end, rows.stop * width)
            out[low - begin : high - begin] = decoded[low - rows.start * width : high - rows.start * width]
        return out

    def _rows(self, rows: range | None) -> torch.Tensor:
        beat()
        read = {}
        for key, part in self.parts.items():
            if rows is None or not part.rows:
                read[key] = read_rows(part.entry, part.name)
            else:
                read[key] = read_rows(part.entry, part.name, rows.start // part.rows, -(-rows.stop // part.rows))
        decoded = self.decode(read)
        expected = (len(rows) if rows is not None else self.whole[0], *self.whole[1:])
        assert tuple(decoded.shape) == expected, f"{self.file}: decoded {tuple(decoded.shape)} instead of {expected}"
        return decoded


def row_by_row(shape: tuple[int, int], dtype: str, step: int, rows: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """A matrix of parts that were read whole, in `dtype`, some rows at a time.

    `rows` gives the rows from one number, a multiple of `step`, to another, in fp32.
    """
    import torch

    out = torch.empty(shape, dtype=torch_dtype(dtype))
    at_once = max(step, _SCRATCH_VALUES // shape[1] // step * step)
    for first in range(0, shape[0], at_once):
        last = min(first + at_once, shape[0])
        out[first:last] = rows(first, last)
        beat()
    return out


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[..., W] int32 words → [..., count] integers without sign: a stream of `bits` each, the lowest bits first."""
    import torch

    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)  # a sign that is shifted in is masked out
        return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)[..., :count]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    place = torch.arange(count) * bits
    following = torch.nn.functional.pad(unsigned, (0, 1))  # the stream may end with the last word
    pairs = unsigned[..., place // 32] | following[..., place // 32 + 1] << 32
    return (pairs >> place % 32 & (1 << bits) - 1).to(torch.int32)
