"""linear_full_kl: distillation loss over the whole vocabulary, straight from both models' hidden states and heads.

Legend: N rows, M valid rows, C rows of one chunk, H student's and G teacher's hidden size, V vocabulary, T temperature.

As in linear_sparse_kl the gradients are made in the forward pass, chunk by chunk: four matrix products a chunk (both
models' logits, dX, dW), two chunks of logits at a time, never N×V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.divergence import Divergence
from kdscale_kernels.fused.autograd import ForwardResult, runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.products import GradientSums, HeadProducts, chunk_bytes_for, compute_dtypes, row_chunks
from kdscale_kernels.ops import arguments
from kdscale_kernels.row_steps import RowSteps, row_steps
from kdscale_kernels.rows.results import FullRowSums
from kdscale_kernels.triton_kernels.limits import full_limit
from kdscale_kernels.types import IGNORE_INDEX, Backend, FullKL, LossOptions, require_positive


@runs_eagerly
def linear_full_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int | None = IGNORE_INDEX,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> FullKL:
    """Sum over valid rows of ce_weight·CE + (1 - ce_weight)·T²·D(teacher, student) over the whole vocabulary.

    hidden_NH [N,H], weight_VH [V,H], bias_V [V]: the student's; floating, mixed dtypes are promoted, autocast obeyed.
    teacher_hidden_NG [N,G], teacher_weight_VG [V,G], teacher_bias_V [V]: the teacher's, a constant with its own dtypes.
    labels_N [N]: already shifted; rows equal to ignore_index count for nothing (None: every row counts, and nothing
    waits for the device). All of these may have [B,S] in place of N. divergence as in linear_sparse_kl; the
    cross-entropy is at temperature 1. Heads of different (padded) sizes need vocab_size, the number of entries that
    both have. chunk_bytes None: 64 MiB on a CPU, 1 GiB on CUDA, for both logits together.

    Reverse KL is infinite, and its gradient not a number, where the teacher forbids (logit -inf) what the student does
    not; forward KL is infinite the other way round, and its gradient finite. JSD and the skewed divergences are finite.
    Differentiable once, with respect to hidden_NH, weight_VH and bias_V. One wait for the device, to count the valid
    rows. Raises ValueError for arguments that do not fit together and, on a CPU, for labels out of range and teacher
    rows without a log-sum-exp; elsewhere those turn the loss into NaN or are the device's own error.
    """
    options = LossOptions(ce_weight, temperature, Divergence.of(divergence), softcap=softcap)
    if teacher_softcap is not None:
        require_positive("teacher_softcap", teacher_softcap)
    _, hidden_NH, teacher_hidden_NG, labels_N = arguments.as_rows(
        hidden_NH=hidden_NH, teacher_hidden_NG=teacher_hidden_NG, labels_N=labels_N
    )
    arguments.check_linear(hidden_NH, weight_VH, bias_V)
    arguments.check_linear(teacher_hidden_NG, teacher_weight_VG, teacher_bias_V, "teacher_")
    arguments.check_two_models(hidden_NH, teacher_hidden_NG, labels_N)
    vocab = _shared_vocab(vocab_size, weight_VH.shape[0], teacher_weight_VG.shape[0])
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    teacher_operand, teacher_accumulate = compute_dtypes(teacher_hidden_NG, teacher_weight_VG)
    if torch.float64 in (accumulate, teacher_accumulate):
        operand = teacher_operand = accumulate = torch.float64
    limit = full_limit(options.divergence, accumulate)
    steps = row_steps(choose_backend(backend, hidden_NH.device, limit=limit))
    valid_M = arguments.counted_rows(labels_N, ignore_index)
    labels_M = labels_N[valid_M].long()
    arguments.check_label_values(labels_M, vocab)
    call = _FullCall(
        valid_M,
        labels_M,
        (teacher_hidden_NG.detach(), teacher_weight_VG, teacher_bias_V),
        teacher_operand,
        teacher_softcap,
        options,
        vocab,
        chunk_bytes_for(chunk_bytes, hidden_NH.device),
        operand,
        accumulate,
        steps,
        wants_gradients(hidden_NH, weight_VH, bias_V),
    )
    outputs = with_forward_gradients("linear_full_kl", _run, hidden_NH, weight_VH, bias_V, call)
    tokens = torch.full((), valid_M.numel(), dtype=torch.int64, device=hidden_NH.device)
    return FullKL(outputs[0], tokens, *outputs[1:])


class _FullCall(NamedTuple):
    """What a call of linear_full_kl needs beside its differentiable inputs."""

    valid_M: Tensor
    labels_M: Tensor
    teacher: tuple[Tensor, Tensor, Tensor | None]  # hidden, weight, bias
    teacher_operand: torch.dtype
    teacher_softcap: float | None
    options: LossOptions
    vocab: int
    chunk_bytes: int
    operand: torch.dtype
    accumulate: torch.dtype
    steps: RowSteps
    wants_grad: tuple[bool, ...]  # gradients of hidden, weight, bias


def _run(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: _FullCall) -> ForwardResult:
    """The sums over all valid rows, in the order of FullRowSums, and the gradients of the loss."""
    head = HeadProducts(weight_VH, bias_V, call.operand, call.accumulate, call.vocab)
    teacher_hidden_NG, teacher_weight_VG, teacher_bias_V = call.teacher
    teacher = HeadProducts(teacher_weight_VG, teacher_bias_V, call.teacher_operand, call.accumulate, call.vocab)
    rows, want_grad = call.valid_M.numel(), any(call.wants_grad)
    gradients = GradientSums(hidden_NH, weight_VH, call.wants_grad, head, rows)
    chunks = row_chunks(
        rows,
        call.vocab,
        call.chunk_bytes,
        buffers=call.steps.full_buffers(call.vocab),
        item_bytes=call.accumulate.itemsize,
    )
    size = chunks[0].stop if chunks else 0
    z, teacher_z = (hidden_NH.new_empty((size, call.vocab), dtype=call.accumulate) for _ in range(2))
    per_row = hidden_NH.new_empty((len(FullRowSums._fields), rows), dtype=call.accumulate)
    for chunk in chunks:
        rows_C, count = call.valid_M[chunk], chunk.stop - chunk.start
        hidden_CH = head.cast(hidden_NH.detach()[rows_C])
        per_row[:, chunk], dz_CV = call.steps.full(
            head.logits(hidden_CH, z[:count]),
            teacher.logits(teacher.cast(teacher_hidden_NG[rows_C]), teacher_z[:count]),
            call.labels_M[chunk],
            call.options,
            teacher_softcap=call.teacher_softcap,
            want_grad=want_grad,
            grad_dtype=call.operand if head.native else None,
        )
        if want_grad:
            gradients.add(dz_CV, hidden_CH, rows_C)
    _check_teacher(per_row[FullRowSums._fields.index("teacher_ce_C")])
    return ForwardResult(per_row.sum(1).unbind(), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)


def _check_teacher(teacher_ce_M: Tensor) -> None:
    """Raise ValueError for teacher rows without a log-sum-exp; on a CPU only, as reading it would wait for a device."""
    if teacher_ce_M.device.type == "cpu" and bool(teacher_ce_M.isnan().any()):
        broken = teacher_ce_M.isnan().nonzero()[:, 0].tolist()
        raise ValueError(
            "teacher_hidden, teacher_weight: expected logits with a log-sum-exp, got NaN, +inf or nothing but -inf in "
            f"{len(broken)} of {teacher_ce_M.numel()} valid rows (first: valid row {broken[0]}); "
            "the teacher's forward pass overflowed or its weights are damaged"
        )


def _shared_vocab(vocab_size: int | None, student: int, teacher: int) -> int:
    if vocab_size is None and student != teacher:
        raise ValueError(
            f"vocab_size: the heads have {student} (student) and {teacher} (teacher) rows; "
            "name the number of real entries both share"
        )
    return arguments.resolve_vocab(vocab_size, min(student, teacher), "the smaller head")
