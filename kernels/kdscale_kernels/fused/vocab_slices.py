"""The lean mode of linear_sparse_kl: a slice of the vocabulary at a time (modes.py has the why).

Legend: N rows, M valid rows of one block, H hidden size, V vocabulary, S entries of one slice, R slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kdscale_kernels.fused.autograd import Made
from kdscale_kernels.fused.bf16_slices import Kept as NarrowKept
from kdscale_kernels.fused.bf16_slices import NarrowSteps
from kdscale_kernels.fused.memory_plan import Problem
from kdscale_kernels.fused.products import Head
from kdscale_kernels.row_steps import SliceSteps
from kdscale_kernels.rows.results import Found, Kept, Parts, RowGradient, RowSums
from kdscale_kernels.rows.torch_slices import join


def run_lean(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem) -> Made:
    """The sums over all valid rows and the gradients, dW and the bias's gradient in their tensors' own dtypes."""
    rows = problem.valid_M.numel()
    into = _Gradients(hidden_NH, weight_VH, bias_V, problem)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=problem.accumulate)
    size = problem.layout.rows
    kind: type[_NarrowSlices | _WideSlices] = _NarrowSlices if problem.layout.narrow else _WideSlices
    arena = _arena(hidden_NH, weight_VH, min(rows, size), problem)
    for begin in range(0, rows, size):
        block = slice(begin, min(begin + size, rows))
        slices = kind(hidden_NH, weight_VH, bias_V, problem, block, arena)
        stacked = Parts(*(torch.stack(field, 1) for field in zip(*slices.read(), strict=True)))
        sums, gradient = join(slices.found, stacked, slices.targets, slices.labels_M, problem.options)
        per_row[:, block] = torch.stack(sums)
        if any(problem.wanted):
            hidden_sum_MH = into.rows_of_hidden(slices.hidden_MH)
            for index in range(slices.count):
                slices.write(index, gradient, into, hidden_sum_MH)
            into.place(hidden_sum_MH, problem.valid_M[block])
    return Made(per_row.sum(1).unbind(), into.hidden_NH, into.weight_VH, into.bias_V)


def _arena(hidden_NH: Tensor, weight_VH: Tensor, rows: int, problem: Problem) -> Tensor:
    """[slices held, exponentials, M·S] for what is kept of the logits; one for all blocks of rows.

    Memory from the system is cleared page by page as it is first written: a tenth of the time of a call on a CPU.
    """
    layout = problem.layout
    held = min(layout.held, -(-problem.vocab // layout.width)) if any(problem.wanted) else 0
    dtype = Head(weight_VH, None, problem.operand, problem.accumulate, 0).grad_dtype
    return hidden_NH.new_empty((held, problem.options.exponentials, rows * layout.width), dtype=dtype)


class _Gradients:
    """dX of a block of rows, summed over slices in the accumulation dtype; dW and the bias's, each in its own dtype."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, problem: Problem):
        hidden, weight, bias = problem.wanted
        rows = problem.valid_M.numel()
        self.dtype, self.first = problem.accumulate, True
        self.everywhere = rows == hidden_NH.shape[0]
        self.hidden_NH: Tensor | None = None
        if hidden:
            self.hidden_NH = torch.empty_like(hidden_NH) if self.everywhere else torch.zeros_like(hidden_NH)
        # the first block of rows writes, later ones add; without any there is nothing to write
        make = torch.empty_like if rows else torch.zeros_like
        self.weight_VH = make(weight_VH) if weight else None
        self.bias_V = make(bias_V) if bias and bias_V is not None else None
        for padded in (self.weight_VH, self.bias_V):
            if padded is not None:
                padded[problem.vocab :] = 0.0

    def rows_of_hidden(self, hidden_MH: Tensor) -> Tensor | None:
        """Zeros to sum one block's dX in."""
        return None if self.hidden_NH is None else torch.zeros_like(hidden_MH, dtype=self.dtype)

    def place(self, sum_MH: Tensor | None, rows_M: Tensor) -> None:
        """A block of rows is finished."""
        self.first = False
        if self.hidden_NH is not None and sum_MH is not None:
            if sum_MH.shape[0] == self.hidden_NH.shape[0]:
                self.hidden_NH.copy_(sum_MH)
            else:
                self.hidden_NH[rows_M] = sum_MH.to(self.hidden_NH.dtype)


class _Slices(ABC):
    """The head's slices in order: `read` all, then `write` all. What makes dz is held for the last `layout.held`."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        problem: Problem,
        block: slice,
        arena: Tensor,
    ):
        self.problem, self.weight_VH, self.bias_V, self.arena = problem, weight_VH, bias_V, arena
        width = problem.layout.width
        self.edges = [*range(0, problem.vocab, width), problem.vocab]
        self.count = len(self.edges) - 1
        self.targets, self.labels_M = problem.targets.rows(block), problem.labels_M[block]
        rows_M, everything = problem.valid_M[block], hidden_NH.detach()
        self.hidden_MH = everything if rows_M.numel() == len(everything) else everything[rows_M]
        self.size = self.hidden_MH.shape[0] * width
        self.found = Found.empty(self.targets, self.labels_M, problem.vocab, problem.accumulate)
        self.start(problem)

    def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.hidden_MH.new_empty(shape, dtype=dtype)

    def head(self, index: int) -> Head:
        first, stop = self.edges[index : index + 2]
        bias_S = None if self.bias_V is None else self.bias_V[first:stop]
        problem = self.problem
        return Head(self.weight_VH[first:stop], bias_S, problem.operand, problem.accumulate, stop - first)

    @abstractmethod
    def start(self, problem: Problem) -> None:
        """Make ready for `read`."""

    @abstractmethod
    def read(self) -> list[Parts]:
        """The tail's parts, slice by slice; the entries' logits are in `found` then."""

    @abstractmethod
    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        """Slice `index` of the logits' gradient [M,S], in the dtype that its products take."""

    def write(self, index: int, gradient: RowGradient, into: _Gradients, hidden_sum_MH: Tensor | None) -> None:
        """Slice `index` of the gradients."""
        head, (first, stop) = self.head(index), self.edges[index : index + 2]
        dz_MS = self.dz(index, gradient)
        if hidden_sum_MH is not None:
            head.add_grad_hidden(dz_MS, hidden_sum_MH)
        if into.weight_VH is not None:
            head.grad_weight(dz_MS, self.hidden_MH, into.weight_VH[first:stop], first=into.first)
        if into.bias_V is not None:
            bias_S, dtype = into.bias_V[first:stop], self.problem.accumulate
            bias_S.copy_(dz_MS.sum(0, dtype=dtype) + (0.0 if into.first else bias_S.to(dtype)))

    def place(self, index: int) -> Tensor | None:
        """Where to keep slice `index`, [exponentials, M, S]; None: nowhere."""
        first_kept = self.count - len(self.arena)
        return None if index < first_kept else self.shaped(self.arena[index - first_kept], index)

    def shaped(self, flat: Tensor, index: int) -> Tensor:
        """[..., M, S], contiguous at this slice's width: the last slice may be narrower."""
        rows, width = self.hidden_MH.shape[0], self.edges[index + 1] - self.edges[index]
        return flat[..., : rows * width].unflatten(-1, (rows, width))


class _WideSlices(_Slices):
    """Logits with the products' fp32 results."""

    def start(self, problem: Problem) -> None:
        self.held: dict[int, Kept] = {}
        self.steps = SliceSteps(problem.backend, self.targets, self.labels_M, problem.options, self.edges)
        self.operand_MH = self.head(0).cast(self.hidden_MH)
        self.buffer = self.new_empty((self.size,), problem.accumulate)

    def read(self) -> list[Parts]:
        return [self._read(index) for index in range(self.count)]

    def _read(self, index: int) -> Parts:
        place = self.place(index)
        keep = [] if place is None else list(place)
        parts, kept = self.steps.read(self._logits(index), index, self.found, keep)
        if kept is not None:
            self.held[index] = kept
        return parts

    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        if index in self.held:
            return self.steps.write_kept(self.held.pop(index), index, gradient)
        return self.steps.write(self._logits(index), index, gradient, self.head(index).grad_dtype)

    def _logits(self, index: int) -> Tensor:
        return self.head(index).logits(self.operand_MH, self.shaped(self.buffer, index))


class _NarrowSlices(_Slices):
    """Logits with the products' bf16 results (narrow.py has the why)."""

    def start(self, problem: Problem) -> None:
        self.hidden_MH = self.hidden_MH.to(problem.operand)
        weight_VH = self.weight_VH.detach()[: problem.vocab].to(problem.operand)
        self.steps = NarrowSteps(self.hidden_MH, weight_VH, self.targets, self.labels_M, problem.options, self.edges)
        self.found = self.steps.found
        self.held: dict[int, NarrowKept] = {}
        again = len(self.arena) < self.count
        shape = (problem.options.exponentials, self.size if again else 0)
        self.buffer = self.new_empty(shape, problem.operand)

    def read(self) -> list[Parts]:
        return [*(self._read(index)[0] for index in range(self.count)), self.steps.label_part()]

    def _read(self, index: int) -> tuple[Parts, NarrowKept]:
        place = self.place(index)
        parts, kept = self.steps.read(index, self.shaped(self.buffer, index) if place is None else place)
        if place is not None:
            self.held[index] = kept
        return parts, kept

    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        kept = self.held.pop(index) if index in self.held else self._read(index)[1]
        return self.steps.write(kept, index, gradient)
