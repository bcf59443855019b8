"""Parts of a parameter that tensor-parallel ranks hold: some of its rows or columns, under a name that says which.

`model.layers.0.mlp.down_proj.weight@1:0:96` are columns 0 to 95 (dimension 1) of that matrix. A part has a shape and a
storage order of its own; any range of it is a run of the whole parameter (rows) or a run in each row (columns).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NAME = re.compile(r"(.+)@([01]):(\d+):(\d+)")


class Run(NamedTuple):
    """`length` values from `begin` of one storage order are those from `at` of another."""

    begin: int
    at: int
    length: int


@dataclass(frozen=True, order=True)
class TensorSlice:
    """Rows (dim 0) or columns (dim 1) `begin` to `end` of a parameter; a vector has rows alone."""

    dim: int
    begin: int
    end: int

    def named(self, whole: str) -> str:
        return f"{whole}@{self.dim}:{self.begin}:{self.end}"

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        return (*whole[: self.dim], self.end - self.begin, *whole[self.dim + 1 :])

    def runs(self, whole: Sequence[int], begin: int, length: int) -> Iterator[Run]:
        """Where values `begin` to `begin + length` of this part lie in the parameter of shape `whole`, in order."""
        columns = math.prod(whole[1:])
        if self.dim == 0:
            yield Run(self.begin * columns + begin, 0, length)
            return
        width, at = self.end - self.begin, 0
        while at < length:
            row, column = divmod(begin + at, width)
            count = min(width - column, length - at)
            yield Run(row * columns + self.begin + column, at, count)
            at += count


def parse_slice_name(name: str) -> tuple[str, TensorSlice | None]:
    """(parameter, part of it; None: all of it) from the name of either."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name, None
    return match[1], TensorSlice(*map(int, match.groups()[1:]))


def tiles(parts: Sequence[TensorSlice], whole: Sequence[int]) -> bool:
    """Whether `parts` are all of a parameter of shape `whole`, each row or column once."""
    dims = {part.dim for part in parts}
    if len(dims) != 1 or max(dims) >= len(whole):
        return False
    ordered = sorted(parts)
    return [0, *(part.end for part in ordered)] == [*(part.begin for part in ordered), whole[dims.pop()]]


def locate(
    parts: Sequence[TensorSlice], whole: Sequence[int], begin: int, length: int
) -> Iterator[tuple[TensorSlice, Run]]:
    """Which parts hold values `begin` to `begin + length` of a parameter: (part, run from it to the range), in order.

    `parts` must be all of the parameter.
    """
    columns, end, at = math.prod(whole[1:]), begin + length, begin
    while at < end:
        row, column = divmod(at, columns)
        here = row if parts[0].dim == 0 else column
        part = next(part for part in parts if part.begin <= here < part.end)
        if part.dim == 0:
            stop, inside = min(end, part.end * columns), at - part.begin * columns
        else:
            stop = min(end, row * columns + part.end)
            inside = row * (part.end - part.begin) + column - part.begin
        yield part, Run(inside, at - begin, stop - at)
        at = stop
