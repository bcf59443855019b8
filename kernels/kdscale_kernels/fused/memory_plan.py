"""Fast or lean: how a fused loss spends a budget of bytes.

Legend: M valid rows, H hidden size, V vocabulary, S entries of one slice.

*fast* takes rows in chunks, all of the vocabulary at a time: three products (logits, dX, dW), but dW is a sum over
chunks and so a [V, H] array in the accumulation dtype, and on a CPU the head is held as fp32 for the call.
*lean* takes a slice of the vocabulary at a time, and all rows: each slice of dW is finished at once, in its own dtype,
and no more than slices of logits and dX in fp32 are held. A row's softmax needs all slices before any gradient, so a
slice is computed twice, but for those whose exponentials the budget lets it keep. Where two to four blocks of rows make
all of them fit, it takes those instead, and every product once. On a CPU its logits may come as bf16 (narrow.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from kdscale_kernels.fused.products import chunk_bytes_for
from kdscale_kernels.rows.teacher_entries import Targets
from kdscale_kernels.types import LossOptions, Mode

# On a CPU, less than an eighth of what eager torch needs at N=2048 V=49152. There lean is no slower, since its gradient
# products may be bf16 ones. A GPU has memory, and fast spares it a fourth product.
CPU_WORKSPACE = 104 << 20


# Slices that stay in a CPU's cache between the steps on them; on CUDA, wide enough for products at full speed.
SLICE_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}


FEWEST_ROWS = {"cpu": 64, "cuda": 1024}  # a chunk of the fast mode worth having: below, dW's traffic costs more


SLICE_STEP = 128


# Each block after the first adds to a dW that is already rounded: a few times cost less than dz's own rounding.
MOST_BLOCKS = 4


@dataclass(frozen=True)
class Shape:
    """What decides how many bytes a call needs beyond its inputs and gradients."""

    rows: int  # M
    hidden: int
    vocab: int
    device: str
    buffers: int  # [rows, V] arrays of the accumulation dtype that the row step needs at once
    item_bytes: int  # of the accumulation dtype
    head_copy: bool  # the logits need the head in another dtype
    weight_sum: bool  # dW is wanted, and in another dtype than the accumulation's
    hidden_sum: bool  # likewise dX
    kept_bytes: int  # an entry that lean keeps for the gradient instead of computing its logit again
    narrow: bool = False  # lean's logits come as bf16 (narrow.py)


@dataclass(frozen=True)
class Layout:
    """The mode, and what it does with the budget."""

    mode: Mode  # "fast" or "lean"
    chunk_bytes: int = 0  # fast: logits of one chunk
    rows: int = 1  # lean: rows of a block
    width: int = 0  # and entries of a slice
    held: int = 0  # lean: slices whose logits are kept for the gradient
    narrow: bool = False  # lean: logits come as bf16


def layout_for(shape: Shape, mode: Mode, workspace_bytes: int | None, chunk_bytes: int | None) -> Layout:
    """How to run a call of this shape. Raises ValueError for an unknown mode or a budget that is not positive.

    "auto" is fast where its least fits workspace_bytes (None: 104 MiB on a CPU, no limit elsewhere), else lean. Lean
    then holds as many slices as fit. A budget too small even for one narrow slice is exceeded: the call must end.
    """
    for name, value in (("workspace_bytes", workspace_bytes), ("chunk_bytes", chunk_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive number of bytes, got {value}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected {' | '.join(get_args(Mode))}, got {mode!r}")
    if workspace_bytes is None and shape.device == "cpu":
        workspace_bytes = CPU_WORKSPACE
    row_bytes = shape.vocab * shape.item_bytes * shape.buffers
    fixed = shape.item_bytes * (
        shape.vocab * shape.hidden * (shape.head_copy + shape.weight_sum) + shape.rows * shape.hidden * shape.hidden_sum
    )
    chunk = chunk_bytes_for(chunk_bytes, torch.device(shape.device))
    fewest = row_bytes * min(shape.rows, FEWEST_ROWS.get(shape.device, FEWEST_ROWS["cpu"]))
    if chunk_bytes is None and workspace_bytes is not None:
        chunk = max(fewest, min(chunk, workspace_bytes - fixed))
    fits = workspace_bytes is None or fixed + min(chunk, fewest) <= workspace_bytes
    if mode == "fast" or (mode == "auto" and fits):
        return Layout("fast", chunk_bytes=max(chunk, 1))
    return _lean(shape, workspace_bytes, chunk_bytes)


def _lean(shape: Shape, workspace_bytes: int | None, chunk_bytes: int | None) -> Layout:
    """The fewest blocks of rows whose slices can all be kept; one block, with slices made twice, where none are few."""
    layouts = []
    for blocks in range(1, MOST_BLOCKS + 1):
        rows = max(1, -(-shape.rows // blocks))
        layout = _lean_block(shape, rows, workspace_bytes, chunk_bytes)
        if layout.held * layout.width >= shape.vocab:
            return layout
        layouts.append(layout)
    return layouts[0]


def _lean_block(shape: Shape, rows: int, workspace_bytes: int | None, chunk_bytes: int | None) -> Layout:
    slice_bytes = chunk_bytes or SLICE_BYTES.get(shape.device, SLICE_BYTES["cpu"])
    column_bytes = shape.item_bytes * rows
    # Per column of a slice: its logits, what the row step adds, dz in the products' dtype, the head's rows as fp32.
    # Narrow logits are kept where they were made; what widens them is small.
    used = column_bytes * (shape.buffers + 1) + shape.item_bytes * shape.hidden * shape.head_copy
    if shape.narrow:
        used = shape.kept_bytes * rows
    # hidden states as an operand and dX in the accumulation dtype, and one slice's dX
    fixed = shape.item_bytes * rows * shape.hidden * (shape.head_copy + shape.hidden_sum) * 3 // 2
    free = max(0, workspace_bytes - fixed) if workspace_bytes is not None else slice_bytes * 2
    width = min(slice_bytes // min(column_bytes, used), free // used)
    if width < shape.vocab:
        width = width // SLICE_STEP * SLICE_STEP
    width = max(1, min(shape.vocab, max(width, SLICE_STEP)))
    slices, each = -(-shape.vocab // width), shape.kept_bytes * rows * width
    held = min(slices, max(0, free - used * width) // each)
    if shape.narrow and slices * each <= free:
        held = slices
    return Layout("lean", rows=rows, width=width, held=held, narrow=shape.narrow)


@dataclass(frozen=True)
class Problem:
    """Everything the op needs that has no gradient."""

    valid_M: Tensor
    labels_M: Tensor
    targets: Targets
    options: LossOptions
    vocab: int
    layout: Layout
    operand: torch.dtype
    accumulate: torch.dtype
    backend: str
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias
