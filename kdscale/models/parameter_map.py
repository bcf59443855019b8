"""Which tensors on disk make up which parameter of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdscale.errors import CheckpointError
from kdscale.families import Family, TensorSpec, load_family
from kdscale.weights import Checkpoint

Shape = tuple[int, ...]


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")


_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3")


@dataclass(frozen=True, order=True)
class ParameterRange:
    """Elements `offset` … `offset + length` of the flattened parameter, or part of one, `name`."""

    name: str
    offset: int
    length: int


def trained_tensors(
    source: Checkpoint, shapes: Mapping[str, Shape], tied: Mapping[str, str]
) -> dict[str, ParameterRange]:
    """The piece that each tensor of `source` is; tensors that are of no trained parameter (buffers) are left out.

    `tied`: other names of a parameter. Raises CheckpointError when a trained parameter is not whole among the tensors
    of `source`, or one has another shape: its training would be lost without a word.
    """
    found: dict[str, ParameterRange] = {}
    for name in source.names:
        place = _place(tied.get(name, name), shapes)
        if place is not None:
            parameter, offset, shape = place
            if source.spec(name).shape != shape:
                raise CheckpointError(
                    f"{source.path}: tensor {name}", expected=str(list(shape)), got=str(list(source.spec(name).shape))
                )
            found[name] = ParameterRange(parameter, offset, math.prod(shape))
    values = dict.fromkeys(shapes, 0)
    for piece in set(found.values()):
        values[piece.name] += piece.length
    if lost := [name for name, shape in shapes.items() if values[name] != math.prod(shape)]:
        raise CheckpointError(
            f"{source.path}: parameters that are trained but not (wholly) on disk",
            expected="the names of the model's parameters",
            got=", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else ""),
            hint="distillation supports the families that docs/families.md lists",
        )
    return found


def _place(name: str, shapes: Mapping[str, Shape]) -> tuple[str, int, Shape] | None:
    """(parameter, offset in it, shape) of a tensor on disk."""
    if name in shapes:
        return name, 0, shapes[name]
    name = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's files
    if name in shapes:
        return name, 0, shapes[name]
    if (match := _EXPERT.fullmatch(name)) is None:
        return None
    experts, number, matrix = match[1], int(match[2]), match[3]
    fused = f"{experts}.gate_up_proj" if matrix in _GATE + _UP else f"{experts}.down_proj"
    if fused not in shapes or number >= shapes[fused][0]:
        return None
    _, rows, columns = shapes[fused]
    if matrix in _GATE + _UP:
        half = rows // 2
        return fused, (number * rows + (half if matrix in _UP else 0)) * columns, (half, columns)
    return fused, number * rows * columns, (rows, columns)


def assemble(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Parameter name → tensor, from name on disk → spec.

    Tensors of one parameter are put together along the first dimension in their order; those of the experts of a
    mixture, which are apart on disk and one tensor in the model, are then stacked.
    """
    pieces: dict[str, dict[int | None, list[str]]] = {}
    for name, spec in specs.items():
        pieces.setdefault(spec.parameter, {}).setdefault(spec.expert, []).append(name)
    out: dict[str, Tensor] = {}
    for parameter, by_expert in pieces.items():
        whole = [
            read(names[0]) if len(names) == 1 else torch.cat([read(n) for n in names]) for names in by_expert.values()
        ]
        out[parameter] = whole[0] if None in by_expert else torch.stack(whole)
    return out


@dataclass(frozen=True)
class _Piece:
    """A tensor on disk that is values `begin` to `end` of a parameter."""

    name: str
    begin: int
    end: int


class ParameterReader:
    """A checkpoint by the names of the model's parameters; make one with `ParameterReader.open`.

    A parameter is one tensor on disk or several back to back: those that a family fuses along the first dimension, and
    the experts of a mixture, which the model stacks. Either way its values, in storage order, are theirs in order.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family):
        self.checkpoint, self.family = checkpoint, family
        specs = family.tensors(checkpoint.config)
        by_expert: dict[str, dict[int | None, list[str]]] = {}
        for name, spec in specs.items():
            by_expert.setdefault(spec.parameter, {}).setdefault(spec.expert, []).append(name)
        self._pieces: dict[str, list[_Piece]] = {}
        for parameter, groups in by_expert.items():
            at, pieces = 0, []
            for name in (name for names in groups.values() for name in names):
                end = at + torch.Size(specs[name].shape).numel()
                pieces.append(_Piece(name, at, end))
                at = end
            self._pieces[parameter] = pieces

    @classmethod
    def open(cls, path: Path) -> ParameterReader:
        """Reads headers only. Raises CheckpointError for a family that is not known, for quantised weights, and when
        config.json and the weights disagree."""
        checkpoint = Checkpoint.open(path)
        family = load_family(checkpoint.config, str(path / "config.json"))
        checkpoint.verify_against(family)
        return cls(checkpoint, family)

    def numel(self, parameter: str) -> int:
        return self._pieces[parameter][-1].end if parameter in self._pieces else 0

    def names(self) -> set[str]:
        return set(self._pieces)

    def fill(self, parameter: str, begin: int, out: torch.Tensor) -> None:
        """Values `begin` to `begin + len(out)` of a parameter, in storage order, into the flat `out` in its dtype."""
        end = begin + out.numel()
        for piece in self._pieces[parameter]:
            low, high = max(begin, piece.begin), min(end, piece.end)
            if low < high:
                self.checkpoint.fill(piece.name, low - piece.begin, out[low - begin : high - begin])
