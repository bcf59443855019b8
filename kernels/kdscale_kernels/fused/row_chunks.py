"""The fast mode of linear_sparse_kl: rows in chunks, all of the vocabulary at a time (modes.py has the why).

Legend: N rows, M valid rows, C rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from kdscale_kernels.fused.autograd import Made
from kdscale_kernels.fused.memory_plan import Problem
from kdscale_kernels.fused.products import GradientSums, Head, row_chunks
from kdscale_kernels.row_steps import run_rows_step
from kdscale_kernels.rows.results import RowSums


def run_fast(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem) -> Made:
    """Per-quantity sums over all valid rows, and the gradients of the first of them."""
    head = Head(weight_VH, bias_V, problem.operand, problem.accumulate, problem.vocab)
    want_grad, rows = any(problem.wanted), problem.valid_M.numel()
    gradients = GradientSums(hidden_NH, weight_VH, problem.wanted, head, rows)
    chunks = row_chunks(
        rows,
        problem.vocab,
        problem.layout.chunk_bytes,
        buffers=problem.options.buffers if problem.backend == "torch" else 1,
        item_bytes=problem.accumulate.itemsize,
    )
    buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, problem.vocab), dtype=problem.accumulate)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=problem.accumulate)
    for chunk in chunks:
        rows_C = problem.valid_M[chunk]
        hidden_CH = head.cast(hidden_NH.detach()[rows_C])
        z_CV = head.logits(hidden_CH, buffer[: chunk.stop - chunk.start])
        per_row[:, chunk], dz_CV = run_rows_step(
            problem.backend,
            z_CV,
            problem.targets.rows(chunk),
            problem.labels_M[chunk],
            problem.options,
            want_grad=want_grad,
            grad_dtype=problem.operand if head.native else None,
        )
        if want_grad:
            gradients.add(dz_CV, hidden_CH, rows_C)
    return Made(per_row.sum(1).unbind(), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
