"""Row chunks or vocabulary slices: how a fused loss spends a budget of bytes.

Legend: M valid rows, H hidden size, V vocabulary, S entries of one slice.

*Row chunks* take all of the vocabulary for some rows at a time: three products (logits, dX, dW), but dW is a sum over
chunks and so a [V, H] array in the accumulation dtype, and on a CPU the head is held as fp32 during the call.
*Vocabulary slices* take all rows for some entries of the vocabulary at a time: each slice of dW is finished at once, in
its own dtype, and only slices of logits and dX in fp32 are held. A row's softmax needs all slices before any gradient,
so the logits of a slice are computed twice, except for slices whose exponentials the budget lets it keep. Where two to
four blocks of rows let it keep all slices, it takes blocks instead and computes every product once. On a CPU its logits
may be bf16 (bf16_slices.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from kdscale_kernels.fused.products import chunk_bytes_for
from kdscale_kernels.row_steps import RowSteps
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.types import LossOptions, Mode, integer

# On a CPU, less than an eighth of what eager torch needs at N=2048 V=49152. There slices are no slower,
# since their gradient products may be bf16 ones. A GPU has memory, and row chunks spare it a fourth product.
CPU_WORKSPACE = 104 << 20
# Slices that stay in a CPU's cache between the steps on them; on CUDA, wide enough for products at full speed.
SLICE_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
FEWEST_ROWS = {"cpu": 64, "cuda": 1024}  # in a chunk of rows: with fewer, dW's traffic costs more
SLICE_STEP = 128
# Each block after the first adds to a dW that is already rounded: a few times cost less than dz's own rounding.
MOST_BLOCKS = 4


@dataclass(frozen=True)
class CallSize:
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
    kept_bytes: int  # per entry that is kept for the gradient instead of computing its logit again
    bf16_logits: bool = False  # vocabulary slices take bf16 logits (bf16_slices.py)


@dataclass(frozen=True)
class MemoryPlan:
    """The mode of a call, and how it spends the budget."""

    mode: Mode  # "row_chunks" or "vocab_slices"
    chunk_bytes: int = 0  # row chunks: logits of one chunk
    rows: int = 1  # vocabulary slices: rows of a block
    width: int = 0  # entries of a slice
    held: int = 0  # slices whose exponentials are kept for the gradient
    bf16_logits: bool = False  # logits of slices are bf16


def plan_memory(size: CallSize, mode: Mode, workspace_bytes: int | None, chunk_bytes: int | None) -> MemoryPlan:
    """How to run a call of this size. Raises ValueError for an unknown mode or a budget that is not positive.

    "auto" takes row chunks where the fewest rows worth a chunk fit in workspace_bytes (None: 104 MiB on a CPU, no limit
    elsewhere), else slices, and keeps as many as fit. A budget too small for a single slice is exceeded.
    """
    for name, value in (("workspace_bytes", workspace_bytes), ("chunk_bytes", chunk_bytes)):
        if value is not None:
            integer(name, value, 1)
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected {' | '.join(get_args(Mode))}, got {mode!r}")
    if workspace_bytes is None and size.device == "cpu":
        workspace_bytes = CPU_WORKSPACE
    row_bytes = size.vocab * size.item_bytes * size.buffers
    fixed = size.item_bytes * (
        size.vocab * size.hidden * (size.head_copy + size.weight_sum) + size.rows * size.hidden * size.hidden_sum
    )
    chunk = chunk_bytes_for(chunk_bytes, torch.device(size.device))
    fewest = row_bytes * min(size.rows, FEWEST_ROWS.get(size.device, FEWEST_ROWS["cpu"]))
    if chunk_bytes is None and workspace_bytes is not None:
        chunk = max(fewest, min(chunk, workspace_bytes - fixed))
    fits = workspace_bytes is None or fixed + min(chunk, fewest) <= workspace_bytes
    if mode == "row_chunks" or (mode == "auto" and fits):
        return MemoryPlan("row_chunks", chunk_bytes=max(chunk, 1))
    return _plan_slices(size, workspace_bytes, chunk_bytes)


def _plan_slices(size: CallSize, workspace_bytes: int | None, chunk_bytes: int | None) -> MemoryPlan:
    """The fewest blocks of rows whose slices can all be kept; else one block, whose slices are computed twice."""
    plans = []
    for blocks in range(1, MOST_BLOCKS + 1):
        rows = max(1, -(-size.rows // blocks))
        plan = _plan_block(size, rows, workspace_bytes, chunk_bytes)
        if plan.held * plan.width >= size.vocab:
            return plan
        plans.append(plan)
    return plans[0]


def _plan_block(size: CallSize, rows: int, workspace_bytes: int | None, chunk_bytes: int | None) -> MemoryPlan:
    slice_bytes = chunk_bytes or SLICE_BYTES.get(size.device, SLICE_BYTES["cpu"])
    column_bytes = size.item_bytes * rows
    # Per column of a slice: its logits, what the row step adds, dz in the products' dtype, the head's rows as fp32.
    # bf16 logits are kept where they were computed; their fp32 copies are small.
    used = column_bytes * (size.buffers + 1) + size.item_bytes * size.hidden * size.head_copy
    if size.bf16_logits:
        used = size.kept_bytes * rows
    # hidden states as an operand and dX in the accumulation dtype, and one slice's dX
    fixed = size.item_bytes * rows * size.hidden * (size.head_copy + size.hidden_sum) * 3 // 2
    free = max(0, workspace_bytes - fixed) if workspace_bytes is not None else slice_bytes * 2
    width = min(slice_bytes // min(column_bytes, used), free // used)
    if width < size.vocab:
        width = width // SLICE_STEP * SLICE_STEP
    width = max(1, min(size.vocab, max(width, SLICE_STEP)))
    slices, slice_kept = -(-size.vocab // width), size.kept_bytes * rows * width
    held = min(slices, max(0, free - used * width) // slice_kept)
    if size.bf16_logits and slices * slice_kept <= free:
        held = slices
    return MemoryPlan("vocab_slices", rows=rows, width=width, held=held, bf16_logits=size.bf16_logits)


class SparseCall(NamedTuple):
    """What a call of linear_sparse_kl needs beside its differentiable inputs."""

    valid_M: Tensor
    labels_M: Tensor
    entries: TeacherEntries
    options: LossOptions
    vocab: int
    plan: MemoryPlan
    operand: torch.dtype
    accumulate: torch.dtype
    steps: RowSteps
    wants_grad: tuple[bool, ...]  # gradients of hidden, weight, bias
