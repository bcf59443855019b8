"""The lean mode of linear_sparse_kl: all rows, a slice of the vocabulary at a time (modes.py has the why).

Legend: M valid rows, H hidden size, V vocabulary, S entries of one slice, R slices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.made_in_forward import Made
from kdscale_kernels.problem import Problem
from kdscale_kernels.products import Head
from kdscale_kernels.slices import Found, Kept, Parts, RowGradient, SliceSteps, join


def run_lean(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem) -> Made:
    """The sums over all valid rows and the gradients, dW and the bias's gradient in their tensors' own dtypes."""
    rows, everything = problem.valid_M.numel(), hidden_NH.detach()
    hidden_MH = everything if rows == hidden_NH.shape[0] else everything[problem.valid_M]
    vocab_slices = _Slices(hidden_MH, weight_VH, bias_V, problem)
    found = Found.empty(problem.targets, problem.labels_M, problem.vocab, problem.accumulate)
    parts = [vocab_slices.read(index, found) for index in range(vocab_slices.count)]
    stacked = Parts(*(torch.stack(field, 1) for field in zip(*parts, strict=True)))
    sums, gradient = join(found, stacked, problem.targets, problem.labels_M, problem.options)
    totals = torch.stack(sums).sum(1).unbind()
    if not any(problem.wanted):
        return Made(totals, None, None, None)
    into = _Gradients(hidden_MH, weight_VH, bias_V, problem)
    for index in range(vocab_slices.count):
        vocab_slices.write(index, gradient, into)
    return Made(totals, into.whole_hidden(hidden_NH, problem), into.weight_VH, into.bias_V)


class _Gradients:
    """dX summed over slices in the accumulation dtype; dW and the bias's, finished slice by slice."""

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem):
        hidden, weight, bias = problem.wanted
        self.hidden_MH = torch.zeros_like(hidden_MH, dtype=problem.accumulate) if hidden else None
        self.weight_VH = torch.empty_like(weight_VH) if weight else None
        self.bias_V = torch.empty_like(bias_V) if bias and bias_V is not None else None
        for padded in (self.weight_VH, self.bias_V):
            if padded is not None:
                padded[problem.vocab :] = 0.0

    def whole_hidden(self, hidden_NH: Tensor, problem: Problem) -> Tensor | None:
        """dX with its ignored rows."""
        if self.hidden_MH is None or self.hidden_MH.shape[0] == hidden_NH.shape[0]:
            return self.hidden_MH
        whole_NH = torch.zeros_like(hidden_NH)
        whole_NH[problem.valid_M] = self.hidden_MH.to(whole_NH.dtype)
        return whole_NH


class _Slices:
    """The head's slices in order, their logits made when asked for; those of the last `held` once only."""

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem):
        self.problem, self.weight_VH, self.bias_V = problem, weight_VH, bias_V
        width = problem.layout.width
        self.edges = [*range(0, problem.vocab, width), problem.vocab]
        self.count = len(self.edges) - 1
        self.held: dict[int, Kept] = {}
        self.steps = SliceSteps(problem.backend, problem.targets, problem.labels_M, problem.options, self.edges)
        self.hidden_MH = hidden_MH
        self.operand_MH = self.head(0).cast(hidden_MH)
        size = hidden_MH.shape[0] * width
        self.buffer = hidden_MH.new_empty(size, dtype=problem.accumulate)
        held = min(problem.layout.held, self.count) if any(problem.wanted) else 0
        # One block: many small ones would stay with the C library's allocator after the call.
        shape = (held, problem.options.exponentials, size)
        self.arena = hidden_MH.new_empty(shape, dtype=self.head(0).grad_dtype) if held else None

    def head(self, index: int) -> Head:
        first, stop = self.edges[index : index + 2]
        bias_S = None if self.bias_V is None else self.bias_V[first:stop]
        problem = self.problem
        return Head(self.weight_VH[first:stop], bias_S, problem.operand, problem.accumulate, stop - first)

    def read(self, index: int, found: Found) -> Parts:
        first_kept = self.count - (self.arena.shape[0] if self.arena is not None else 0)
        keep: list[Tensor] = []
        if self.arena is not None and index >= first_kept:
            keep = [self._shaped(flat, index) for flat in self.arena[index - first_kept]]
        parts, kept = self.steps.read(self._logits(index), index, found, keep)
        if kept is not None:
            self.held[index] = kept
        return parts

    def write(self, index: int, gradient: RowGradient, into: _Gradients) -> None:
        """Slice `index` of the gradients."""
        head, (first, stop) = self.head(index), self.edges[index : index + 2]
        if index in self.held:
            dz_MS = self.steps.write_kept(self.held.pop(index), index, gradient)
        else:
            dz_MS = self.steps.write(self._logits(index), index, gradient, head.grad_dtype)
        if into.hidden_MH is not None:
            into.hidden_MH.add_(head.grad_hidden(dz_MS))
        if into.weight_VH is not None:
            head.grad_weight(dz_MS, self.hidden_MH, into.weight_VH[first:stop])
        if into.bias_V is not None:
            into.bias_V[first:stop] = dz_MS.sum(0, dtype=self.problem.accumulate)

    def _logits(self, index: int) -> Tensor:
        return self.head(index).logits(self.operand_MH, self._shaped(self.buffer, index))

    def _shaped(self, flat: Tensor, index: int) -> Tensor:
        """[M, S], contiguous at this slice's width: the last slice may be narrower."""
        rows, width = self.hidden_MH.shape[0], self.edges[index + 1] - self.edges[index]
        return flat[: rows * width].view(rows, width)
