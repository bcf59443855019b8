"""Tensors that go along with the language model (vision tower, projector): as they are, or cut with its hidden size.

What writes into the residual stream from outside gives the student's channels as its own sublayers do: the kept ones,
or their combinations P x where the stream is cut by `refit`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdscale.prune.slicing import Slicer
from kdscale.prune.stream_cut import CutStudent
from kdscale.weights import Checkpoint, TensorInfo

_BLOCK_BYTES = 1 << 22


def carried_specs(teacher: Checkpoint, slicer: Slicer) -> dict[str, TensorInfo]:
    """Shape and dtype that each carried tensor has in the student, in file order."""
    specs: dict[str, TensorInfo] = {}
    for name in teacher.carried:
        shape, dtype = teacher.spec(name)
        kept = slicer.carried_indices(name) or [None] * len(shape)
        specs[name] = TensorInfo(tuple(n if i is None else len(i) for n, i in zip(shape, kept, strict=True)), dtype)
    return specs


def carried_blocks(teacher: Checkpoint, slicer: Slicer, name: str, start: CutStudent | None) -> Iterator[Tensor]:
    """One carried tensor of the student, in blocks of rows; `start` where the hidden axis is cut by `refit`."""
    kept = slicer.carried_indices(name)
    if all(indices is None for indices in kept):
        yield from teacher.blocks(name, _BLOCK_BYTES)
        return
    tensor = teacher.tensor(name)
    for dimension, indices in enumerate(kept):
        if indices is not None and start is not None:
            tensor = along(start.basis.rows_HD, tensor, dimension)
        elif indices is not None:
            tensor = tensor.index_select(dimension, torch.tensor(indices))
    yield tensor


def along(matrix_HD: Tensor, tensor: Tensor, dimension: int) -> Tensor:
    """The tensor with the D values along a dimension replaced by H combinations, computed in fp64, in its dtype."""
    product = torch.tensordot(matrix_HD.double(), tensor.double(), dims=([1], [dimension]))
    return product.movedim(0, dimension).to(tensor.dtype).contiguous()
