"""sparse_kl: the losses of linear_sparse_kl on logits that already exist.

Legend: N rows, M valid rows, C rows of one chunk, V vocabulary, K teacher entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.divergence import Divergence
from kdscale_kernels.fused.autograd import (
    OnceDifferentiable,
    in_torch_func,
    keep,
    kept_gradients,
    refuse_double_backward,
    runs_eagerly,
    scale,
)
from kdscale_kernels.fused.products import chunk_bytes_for, row_chunks
from kdscale_kernels.ops import arguments
from kdscale_kernels.row_steps import RowSteps, row_steps
from kdscale_kernels.rows.results import RowSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.triton_kernels.limits import sparse_limit
from kdscale_kernels.types import IGNORE_INDEX, Backend, LossOptions, SparseKL, Tail


@runs_eagerly
def sparse_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int | None = IGNORE_INDEX,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    tail: Tail = "bucket",
    target_weights_NK: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_grad: bool = False,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> SparseKL:
    """linear_sparse_kl's loss from logits_NV [N,V] or [B,S,V] (floating); the other arguments are as there.

    The gradient takes one array of the logits' shape and dtype. With inplace_grad it is written over the logits: they
    are gone after the call (a slice [B,S,V] with gaps is copied first), backward can run once, and autograd raises if
    something else had saved them. Logits that are bf16 already carry their rounding; prefer linear_sparse_kl where the
    head is at hand.
    Raises ValueError as linear_sparse_kl does.
    """
    options = LossOptions(ce_weight, temperature, Divergence.of(divergence), tail, softcap)
    _, logits_NV, *targets, labels_N = arguments.as_rows(
        logits_NV=logits_NV,
        ids_NK=ids_NK,
        teacher_logits_NK=teacher_logits_NK,
        teacher_lse_N=teacher_lse_N,
        target_weights_NK=target_weights_NK,
        labels_N=labels_N,
    )
    if logits_NV.dim() != 2 or not logits_NV.is_floating_point() or logits_NV.shape[1] == 0:
        raise ValueError(
            f"logits_NV: expected a floating tensor [N, V] or [B, S, V], got {logits_NV.dtype} {tuple(logits_NV.shape)}"
        )
    arguments.check_targets(logits_NV.shape[0], targets, labels_N, tail)
    arguments.check_same_device(logits_NV, labels_N)
    if inplace_grad and in_torch_func():
        raise ValueError("inplace_grad: writes over the logits, which torch.func does not allow; leave it out there")
    vocab = arguments.resolve_vocab(vocab_size, logits_NV.shape[1], "logits")
    accumulate = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    limit = sparse_limit(options.divergence, targets[0].shape[1], accumulate)
    steps = row_steps(choose_backend(backend, logits_NV.device, limit=limit))
    valid = arguments.valid_rows(targets, labels_N, ignore_index, vocab, temperature, accumulate)
    want_grad = torch.is_grad_enabled() and logits_NV.requires_grad
    chunk_bytes = chunk_bytes_for(chunk_bytes, logits_NV.device)
    call = _LogitsCall(*valid, options, vocab, chunk_bytes, want_grad, inplace_grad, steps, kept_gradients())
    outputs = _SparseKL.apply(logits_NV, call)
    tokens = torch.full((), valid.index_M.numel(), dtype=torch.int64, device=logits_NV.device)
    return SparseKL(outputs[0], tokens, *outputs[1:-1])


class _LogitsCall(NamedTuple):
    """What a call of sparse_kl needs beside the logits."""

    valid_M: Tensor
    labels_M: Tensor
    entries: TeacherEntries
    options: LossOptions
    vocab: int
    chunk_bytes: int
    want_grad: bool
    inplace: bool
    steps: RowSteps
    kept: list[Tensor | None] | None


def _run(source_NV: Tensor, call: _LogitsCall) -> tuple[Tensor, Tensor | None]:
    """(sums [6, M] in the order of RowSums, the gradient), chunk by chunk through a copy in the accumulation dtype."""
    grad_NV = (source_NV if call.inplace else torch.zeros_like(source_NV)) if call.want_grad else None
    accumulate, rows = call.entries.logp_NK.dtype, call.valid_M.numel()
    buffers = call.steps.sparse_buffers(call.options)
    per_row = torch.empty(len(RowSums._fields), rows, dtype=accumulate, device=source_NV.device)
    for chunk in row_chunks(rows, call.vocab, call.chunk_bytes, buffers=buffers, item_bytes=accumulate.itemsize):
        rows_C = call.valid_M[chunk]
        z_CV = source_NV[rows_C, : call.vocab].to(accumulate)
        per_row[:, chunk], dz_CV = call.steps.sparse(
            z_CV, call.entries.rows(chunk), call.labels_M[chunk], call.options, want_grad=call.want_grad
        )
        if grad_NV is not None:
            grad_NV[rows_C, : call.vocab] = dz_CV.to(grad_NV.dtype)
    if grad_NV is not None and call.inplace:
        _clear_unused(grad_NV, call)
    return per_row, grad_NV


def _run_over_logits(source_NV: Tensor, call: _LogitsCall) -> tuple[Tensor, Tensor]:
    """As _run, in one step that reads the logits where they are and writes the gradient there."""
    grad_NV = source_NV if call.inplace else source_NV.clone(memory_format=torch.contiguous_format)
    per_row, _ = call.steps.sparse(
        grad_NV[:, : call.vocab], call.entries, call.labels_M, call.options, want_grad=True, rows_C=call.valid_M
    )
    _clear_unused(grad_NV, call)
    return per_row, grad_NV


def _clear_unused(grad_NV: Tensor, call: _LogitsCall) -> None:
    """Write zeros where logits took no part: padding columns, and ignored rows by index, without a pass over N×V."""
    grad_NV[:, call.vocab :] = 0.0
    ignored_N = torch.ones(grad_NV.shape[0], dtype=torch.bool, device=grad_NV.device)
    ignored_N[call.valid_M] = False
    grad_NV.index_fill_(0, ignored_N.nonzero()[:, 0], 0.0)


class _SparseKL(OnceDifferentiable):
    @staticmethod
    def forward(logits_NV: Tensor, call: _LogitsCall) -> tuple[Tensor | None, ...]:
        source_NV = logits_NV.detach()
        over = call.want_grad and source_NV.dtype in call.steps.in_place_dtypes
        grad_NV: Tensor | None
        if over and (not call.inplace or source_NV.stride(1) == 1):
            per_row, grad_NV = _run_over_logits(source_NV, call)
        else:
            per_row, grad_NV = _run(source_NV, call)
        return (*per_row.sum(1).unbind(), *keep([None if call.inplace else grad_NV], call.kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits_NV, call = inputs
        ctx.op, ctx.in_func, ctx.inplace = "sparse_kl", call.kept is None, call.inplace
        # Kept off save_for_backward when in place: an input whose version has moved on could not be saved.
        ctx.grad_NV = logits_NV.detach() if call.inplace else None
        ctx.save_for_backward(*(output[-1:] if call.kept is None else call.kept))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx, grad_outputs[-1:])
        factor = grad_outputs[0]
        if factor is None:
            return None, None
        if not ctx.inplace:
            (grad_NV,) = ctx.saved_tensors
            return scale(grad_NV, factor, grad_NV.dtype), None
        if ctx.grad_NV is None:
            raise RuntimeError("sparse_kl(inplace_grad=True): backward can run once only")
        grad_NV, ctx.grad_NV = ctx.grad_NV, None
        return grad_NV.mul_(factor), None
