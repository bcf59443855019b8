"""Bytes of the losses of a training step: what they work in, and what of them waits for the backward.

The letters and where formulas come from are as in sizing/memory.py.
"""

from __future__ import annotations

from kdscale.sizing.job import Job, Setting
from kdscale.sizing.model_shape import ModelShape

# The same as in kdscale_kernels (fused/products.py, fused/memory_plan.py), which may not be imported; a test compares.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
CPU_WORKSPACE, FEWEST_ROWS = 104 << 20, 64


def loss_bytes(job: Job, setting: Setting) -> float:
    """linear_sparse_kl's workspace and the gradients that it makes in the forward (read: fused/memory_plan.py)."""
    rows, model, b = setting.rows(job), job.student, job.item_bytes
    chunk, by_rows = loss_chunk(job, rows)
    hidden = rows * model.hidden
    inputs = b * hidden * 2  # the rows that have a label, and their gradient
    if not by_rows:
        return inputs + CPU_WORKSPACE + b * trained_head(job)
    sums = 4 * trained_head(job) + (4 * hidden if b == 2 else 0)  # dW and dX in fp32
    copies = 4 * model.head if job.device == "cpu" and b == 2 else 0
    teacher_side = 2 * chunk if job.top_k is None else 0.0
    logits = min(chunk, 4 * rows * model.vocab * job.loss_buffers)
    rounded = logits / 2 / job.loss_buffers if b == 2 else 0.0  # their gradient as the products take it
    return inputs + logits + rounded + sums + copies + teacher_side


def kept_loss_bytes(job: Job, setting: Setting) -> float:
    """The loss's gradients from the forward until the backward has scaled them: dX, and dW in fp32 (slices: as W)."""
    rows = setting.rows(job)
    _, by_rows = loss_chunk(job, rows)
    return 2 * job.item_bytes * rows * job.student.hidden + (4 if by_rows else job.item_bytes) * trained_head(job)


def trained_head(job: Job) -> int:
    """Weights of the head that the loss makes a gradient of: none beside adapters."""
    return job.student.head if job.adapters is None else 0


def loss_chunk(job: Job, rows: int) -> tuple[float, bool]:
    """(bytes of a chunk of logits, whether chunks are of rows or of the vocabulary), as kdscale_kernels plans them."""
    chunk = float(CHUNK_BYTES[job.device])
    if job.device == "cuda":
        return chunk, True
    head_copies = 2 if job.item_bytes == 2 else 0
    hidden_copy = 1 if job.item_bytes == 2 else 0
    fixed = 4 * (job.student.head * head_copies + rows * job.student.hidden * hidden_copy)
    fewest = 4.0 * job.student.vocab * job.loss_buffers * min(rows, FEWEST_ROWS)
    chunk = max(fewest, min(chunk, CPU_WORKSPACE - fixed))
    return chunk, fixed + min(chunk, fewest) <= CPU_WORKSPACE


def _teacher_head_bytes(job: Job, setting: Setting) -> float:
    """linear_topk_lse: a chunk of logits, on a CPU an fp32 copy of the head, and the targets."""
    return max(_head_bytes(job, setting, teacher) for teacher in job.teachers)


def _head_bytes(job: Job, setting: Setting, model: ModelShape) -> float:
    rows = setting.rows(job)
    hidden = job.item_bytes * rows * model.hidden
    if job.top_k is None:
        return float(hidden)
    copy = 4 * model.head if job.device == "cpu" and job.item_bytes == 2 else 0
    return hidden + min(CHUNK_BYTES[job.device], 4 * rows * model.vocab) + copy + rows * (12 * job.top_k + 4)


def kept_layer_bytes(job: Job, setting: Setting) -> float:
    """Of losses on layers: the teacher's rows, and the student's with their gradients (read: objectives/blockwise)."""
    losses, b = job.layer_losses, job.item_bytes
    rows = losses.teacher_bytes(job.teacher, b) + losses.student_bytes(job.student, job.teacher, b)
    return setting.rows(job) * rows


def layer_loss_bytes(job: Job, setting: Setting) -> float:
    """While they are computed: fp32 gradients of one pair of layers beside what is kept."""
    working = job.layer_losses.working_bytes(job.student, job.teacher)
    return kept_layer_bytes(job, setting) + setting.rows(job) * working


def teacher_loss_bytes(job: Job, setting: Setting) -> float:
    """The head's targets, and the rows of layers."""
    layers = setting.rows(job) * job.layer_losses.teacher_bytes(job.teacher, job.item_bytes)
    return _teacher_head_bytes(job, setting) + layers
