"""Which part of which trained parameter each tensor on disk is.

For dense models the names are the same. transformers keeps the experts of a mixture as two fused parameters a layer,
`experts.gate_up_proj` (experts, 2 × ffn, hidden) and `experts.down_proj` (experts, hidden, ffn), while the files have
one tensor an expert and matrix; each of those is a run of consecutive elements of the fused one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from kdscale.distill.pieces import Piece
from kdscale.errors import CheckpointError
from kdscale.weights import Checkpoint

Shape = tuple[int, ...]
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3")


def trained_tensors(source: Checkpoint, shapes: Mapping[str, Shape], tied: Mapping[str, str]) -> dict[str, Piece]:
    """The piece that each tensor of `source` is; tensors that are of no trained parameter (buffers) are left out.

    `tied`: other names of a parameter. Raises CheckpointError when a trained parameter is not whole among the tensors
    of `source`, or one has another shape: its training would be lost without a word.
    """
    found: dict[str, Piece] = {}
    for name in source.names:
        place = _place(tied.get(name, name), shapes)
        if place is not None:
            parameter, offset, shape = place
            if source.spec(name).shape != shape:
                raise CheckpointError(
                    f"{source.path}: tensor {name}", expected=str(list(shape)), got=str(list(source.spec(name).shape))
                )
            found[name] = Piece(parameter, offset, math.prod(shape))
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
