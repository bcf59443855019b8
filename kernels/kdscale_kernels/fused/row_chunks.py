"""linear_sparse_kl by chunks of rows, all of the vocabulary at a time (memory_plan.py says when).

Legend: N rows, M valid rows, C rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from kdscale_kernels.fused.autograd import ForwardResult
from kdscale_kernels.fused.memory_plan import SparseCall
from kdscale_kernels.fused.products import GradientSums, HeadProducts, row_chunks
from kdscale_kernels.rows.results import RowSums


def run_row_chunks(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: SparseCall) -> ForwardResult:
    """The sums over all valid rows, and the gradients of the loss."""
    head = HeadProducts(weight_VH, bias_V, call.operand, call.accumulate, call.vocab)
    want_grad, rows = any(call.wants_grad), call.valid_M.numel()
    gradients = GradientSums(hidden_NH, weight_VH, call.wants_grad, head, rows)
    chunks = row_chunks(
        rows,
        call.vocab,
        call.plan.chunk_bytes,
        buffers=call.steps.sparse_buffers(call.options),
        item_bytes=call.accumulate.itemsize,
    )
    buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, call.vocab), dtype=call.accumulate)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=call.accumulate)
    for chunk in chunks:
        rows_C = call.valid_M[chunk]
        hidden_CH = head.cast(hidden_NH.detach()[rows_C])
        z_CV = head.logits(hidden_CH, buffer[: chunk.stop - chunk.start])
        per_row[:, chunk], dz_CV = call.steps.sparse(
            z_CV,
            call.entries.rows(chunk),
            call.labels_M[chunk],
            call.options,
            want_grad=want_grad,
            grad_dtype=call.operand if head.native else None,
        )
        if want_grad:
            gradients.add(dz_CV, hidden_CH, rows_C)
    return ForwardResult(per_row.sum(1).unbind(), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
