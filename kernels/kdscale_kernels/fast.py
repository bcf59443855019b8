"""The fast mode of linear_sparse_kl: rows in chunks, all of the vocabulary at a time (modes.py has the why).

Legend: N rows, M valid rows, C rows of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.made_in_forward import Made
from kdscale_kernels.problem import Problem
from kdscale_kernels.products import Head, row_chunks
from kdscale_kernels.rows import RowSums, run_rows_step


class _Gradients:
    """The sums of gradients over chunks, in the accumulation dtype, for the inputs that want one."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, problem: Problem):
        def zeros(shape: tuple[int, ...], wanted: bool) -> Tensor | None:
            return torch.zeros(shape, dtype=problem.accumulate, device=hidden_NH.device) if wanted else None

        rows = problem.valid_M.numel()
        self.vocab = problem.vocab
        self.hidden_NH = zeros(tuple(hidden_NH.shape), problem.wanted[0])
        self.weight_VH = zeros(tuple(weight_VH.shape), problem.wanted[1] and not rows)
        if problem.wanted[1] and rows:  # the first chunk writes, later ones add: no pass over V·H to clear it
            self.weight_VH = hidden_NH.new_empty(weight_VH.shape, dtype=problem.accumulate)
            self.weight_VH[problem.vocab :] = 0.0
        self.first = True
        self.bias_V = zeros((weight_VH.shape[0],), problem.wanted[2])

    def add(self, head: Head, dz_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor) -> None:
        if self.hidden_NH is not None:
            self.hidden_NH[rows_C] = head.grad_hidden(dz_CV).to(self.hidden_NH.dtype)
        if self.weight_VH is not None:
            head.add_grad_weight(dz_CV, hidden_CH, self.weight_VH[: self.vocab], first=self.first)
            self.first = False
        if self.bias_V is not None:
            self.bias_V[: self.vocab] += dz_CV.sum(0, dtype=self.bias_V.dtype)


def run_fast(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem) -> Made:
    """Per-quantity sums over all valid rows, and the gradients of the first of them."""
    gradients = _Gradients(hidden_NH, weight_VH, problem)
    head = Head(weight_VH, bias_V, problem.operand, problem.accumulate, problem.vocab)
    want_grad, rows = any(problem.wanted), problem.valid_M.numel()
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
            gradients.add(head, dz_CV, hidden_CH, rows_C)
    return Made(per_row.sum(1).unbind(), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
