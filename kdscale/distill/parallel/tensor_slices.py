"""Slices of a parameter that tensor-parallel ranks hold: some of its rows or columns, under a name that says which.

`model.layers.0.mlp.down_proj.weight@1:0:96` is columns 0 to 95 (dimension 1) of that matrix. A slice has a shape and a
storage order of its own. A range of its values is one range of the whole parameter (rows), or one per row (columns).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NAME = re.compile(r"(.+)@([01]):(\d+):(\d+)")


class CopyRange(NamedTuple):
    """`length` values, at `source` in the storage order they are read from and at `target` in the one they go to."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, order=True)
class TensorSlice:
    """Rows (dim 0) or columns (dim 1) `begin` to `end` of a parameter; a vector has only rows."""

    dim: int
    begin: int
    end: int

    @classmethod
    def all_rows(cls, shape: Sequence[int]) -> TensorSlice:
        """The slice that is all of a parameter."""
        return cls(0, 0, shape[0] if shape else 1)

    def named(self, parameter: str) -> str:
        """The name of this slice of `parameter`."""
        return f"{parameter}@{self.dim}:{self.begin}:{self.end}"

    def shape(self, parameter_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of this slice of a parameter."""
        return (*parameter_shape[: self.dim], self.end - self.begin, *parameter_shape[self.dim + 1 :])

    def ranges(self, parameter_shape: Sequence[int], begin: int, length: int) -> Iterator[CopyRange]:
        """Where values `begin` to `begin + length` of this slice lie in the parameter, in order."""
        columns = math.prod(parameter_shape[1:])
        if self.dim == 0:
            yield CopyRange(self.begin * columns + begin, 0, length)
            return
        width, target = self.end - self.begin, 0
        while target < length:
            row, column = divmod(begin + target, width)
            count = min(width - column, length - target)
            yield CopyRange(row * columns + self.begin + column, target, count)
            target += count


def parse_slice_name(name: str) -> tuple[str, TensorSlice | None]:
    """(parameter, slice) from the name of a parameter or of a slice; the slice of a whole parameter is None."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name, None
    return match[1], TensorSlice(*map(int, match.groups()[1:]))


def cover_parameter(slices: Sequence[TensorSlice], shape: Sequence[int]) -> bool:
    """Whether `slices` hold each row, or each column, of a parameter exactly once."""
    dims = {entry.dim for entry in slices}
    if len(dims) != 1 or max(dims) >= len(shape):
        return False
    ordered = sorted(slices)
    begins, ends = [entry.begin for entry in ordered], [entry.end for entry in ordered]
    return [0, *ends] == [*begins, shape[dims.pop()]]


def ranges_in_slices(
    slices: Sequence[TensorSlice], shape: Sequence[int], begin: int, length: int
) -> Iterator[tuple[TensorSlice, CopyRange]]:
    """Which slices hold values `begin` to `begin + length` of a parameter, and where in each, in order.

    The slices must cover the parameter.
    """
    columns, end, at = math.prod(shape[1:]), begin + length, begin
    while at < end:
        row, column = divmod(at, columns)
        index = row if slices[0].dim == 0 else column
        holder = next(candidate for candidate in slices if candidate.begin <= index < candidate.end)
        if holder.dim == 0:
            stop, source = min(end, holder.end * columns), at - holder.begin * columns
        else:
            stop = min(end, row * columns + holder.end)
            source = row * (holder.end - holder.begin) + column - holder.begin
        yield holder, CopyRange(source, at - begin, stop - at)
        at = stop
