"""linear_sparse_kl by slices of the vocabulary, all rows of a block at a time (memory_plan.py says when).

Legend: N rows, M valid rows of one block, H hidden size, V vocabulary, S entries of one slice, R slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kdscale_kernels.fused.autograd import ForwardResult
from kdscale_kernels.fused.bf16_slices import Bf16Slices, KeptSlice
from kdscale_kernels.fused.memory_plan import SparseCall
from kdscale_kernels.fused.products import HeadProducts
from kdscale_kernels.rows.results import EntryLogits, RowGradient, RowSums, SliceExponentials, TailSums
from kdscale_kernels.rows.torch_slices import join_slices


def run_vocab_slices(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: SparseCall) -> ForwardResult:
    """The sums over all valid rows and the gradients, dW and the bias's gradient in their tensors' own dtypes."""
    rows = call.valid_M.numel()
    into = _Gradients(hidden_NH, weight_VH, bias_V, call)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=call.accumulate)
    size = call.plan.rows
    head_slices: type[_Bf16HeadSlices | _Fp32HeadSlices] = _Bf16HeadSlices if call.plan.bf16_logits else _Fp32HeadSlices
    arena = _arena(hidden_NH, weight_VH, min(rows, size), call)
    for begin in range(0, rows, size):
        block = slice(begin, min(begin + size, rows))
        slices = head_slices(hidden_NH, weight_VH, bias_V, call, block, arena)
        stacked = TailSums(*(torch.stack(field, 1) for field in zip(*slices.read(), strict=True)))
        sums, gradient = join_slices(slices.entry_logits, stacked, slices.entries, slices.labels_M, call.options)
        per_row[:, block] = torch.stack(sums)
        if any(call.wants_grad):
            hidden_sum_MH = into.rows_of_hidden(slices.hidden_MH)
            for index in range(slices.count):
                slices.write(index, gradient, into, hidden_sum_MH)
            into.place(hidden_sum_MH, call.valid_M[block])
    return ForwardResult(per_row.sum(1).unbind(), into.hidden_NH, into.weight_VH, into.bias_V)


def _arena(hidden_NH: Tensor, weight_VH: Tensor, rows: int, call: SparseCall) -> Tensor:
    """Memory for the exponentials of the slices that are kept [slices, exponentials, M·S], for all blocks of rows.

    The system clears new memory page by page at the first write, which takes a tenth of a call's time on a CPU.
    """
    plan = call.plan
    held = min(plan.held, -(-call.vocab // plan.width)) if any(call.wants_grad) else 0
    dtype = HeadProducts(weight_VH, None, call.operand, call.accumulate, 0).grad_dtype
    return hidden_NH.new_empty((held, call.options.exponentials, rows * plan.width), dtype=dtype)


class _Gradients:
    """dX, summed over a block's slices in the accumulation dtype; dW and the bias's gradient in their own dtypes."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: SparseCall):
        hidden, weight, bias = call.wants_grad
        rows = call.valid_M.numel()
        self.dtype, self.first = call.accumulate, True
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
                padded[call.vocab :] = 0.0

    def rows_of_hidden(self, hidden_MH: Tensor) -> Tensor | None:
        """Zeros [M,H] in which one block's dX is summed, or None."""
        return None if self.hidden_NH is None else torch.zeros_like(hidden_MH, dtype=self.dtype)

    def place(self, sum_MH: Tensor | None, rows_M: Tensor) -> None:
        """Store the finished dX of a block of rows."""
        self.first = False
        if self.hidden_NH is not None and sum_MH is not None:
            if sum_MH.shape[0] == self.hidden_NH.shape[0]:
                self.hidden_NH.copy_(sum_MH)
            else:
                self.hidden_NH[rows_M] = sum_MH.to(self.hidden_NH.dtype)


class _HeadSlices(ABC):
    """The head's slices in order: `read` all, then `write` all. The last `plan.held` keep what makes their dz."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        call: SparseCall,
        block: slice,
        arena: Tensor,
    ):
        self.call, self.weight_VH, self.bias_V, self.arena = call, weight_VH, bias_V, arena
        width = call.plan.width
        self.edges = [*range(0, call.vocab, width), call.vocab]
        self.count = len(self.edges) - 1
        self.entries, self.labels_M = call.entries.rows(block), call.labels_M[block]
        rows_M, everything = call.valid_M[block], hidden_NH.detach()
        self.hidden_MH = everything if rows_M.numel() == len(everything) else everything[rows_M]
        self.size = self.hidden_MH.shape[0] * width
        self.entry_logits = EntryLogits.empty(self.entries, self.labels_M, call.vocab, call.accumulate)
        self.start(call)

    def new_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.hidden_MH.new_empty(shape, dtype=dtype)

    def head(self, index: int) -> HeadProducts:
        first, stop = self.edges[index : index + 2]
        bias_S = None if self.bias_V is None else self.bias_V[first:stop]
        call = self.call
        return HeadProducts(self.weight_VH[first:stop], bias_S, call.operand, call.accumulate, stop - first)

    @abstractmethod
    def start(self, call: SparseCall) -> None:
        """Prepare for `read`."""

    @abstractmethod
    def read(self) -> list[TailSums]:
        """The sums of each slice over its tail; afterwards entry_logits is filled."""

    @abstractmethod
    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        """Slice `index` of the logits' gradient [M,S], in the dtype that its products take."""

    def write(self, index: int, gradient: RowGradient, into: _Gradients, hidden_sum_MH: Tensor | None) -> None:
        """Add slice `index` to the gradients."""
        head, (first, stop) = self.head(index), self.edges[index : index + 2]
        dz_MS = self.dz(index, gradient)
        if hidden_sum_MH is not None:
            head.add_grad_hidden(dz_MS, hidden_sum_MH)
        if into.weight_VH is not None:
            head.grad_weight(dz_MS, self.hidden_MH, into.weight_VH[first:stop], first=into.first)
        if into.bias_V is not None:
            bias_S, dtype = into.bias_V[first:stop], self.call.accumulate
            bias_S.copy_(dz_MS.sum(0, dtype=dtype) + (0.0 if into.first else bias_S.to(dtype)))

    def place(self, index: int) -> Tensor | None:
        """Memory to keep slice `index` in, [exponentials, M, S]; None: it is not kept."""
        first_kept = self.count - len(self.arena)
        return None if index < first_kept else self.shaped(self.arena[index - first_kept], index)

    def shaped(self, flat: Tensor, index: int) -> Tensor:
        """[..., M, S], contiguous at this slice's width: the last slice may be narrower."""
        rows, width = self.hidden_MH.shape[0], self.edges[index + 1] - self.edges[index]
        return flat[..., : rows * width].unflatten(-1, (rows, width))


class _Fp32HeadSlices(_HeadSlices):
    """Slices of fp32 logits."""

    def start(self, call: SparseCall) -> None:
        self.held: dict[int, SliceExponentials] = {}
        self.steps = call.steps.slices(self.entries, self.labels_M, call.options, self.edges)
        self.operand_MH = self.head(0).cast(self.hidden_MH)
        self.buffer = self.new_empty((self.size,), call.accumulate)

    def read(self) -> list[TailSums]:
        return [self._read(index) for index in range(self.count)]

    def _read(self, index: int) -> TailSums:
        place = self.place(index)
        keep = [] if place is None else list(place)
        sums, kept = self.steps.read(self._logits(index), index, self.entry_logits, keep)
        if kept is not None:
            self.held[index] = kept
        return sums

    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        if index in self.held:
            return self.steps.write_kept(self.held.pop(index), index, gradient)
        return self.steps.write(self._logits(index), index, gradient, self.head(index).grad_dtype)

    def _logits(self, index: int) -> Tensor:
        return self.head(index).logits(self.operand_MH, self.shaped(self.buffer, index))


class _Bf16HeadSlices(_HeadSlices):
    """Slices of bf16 logits (bf16_slices.py says why)."""

    def start(self, call: SparseCall) -> None:
        self.hidden_MH = self.hidden_MH.to(call.operand)
        weight_VH = self.weight_VH.detach()[: call.vocab].to(call.operand)
        assert call.steps.bf16_steps is not None
        inputs = (self.hidden_MH, weight_VH, self.entries, self.labels_M, call.options, self.edges)
        self.steps = Bf16Slices(*inputs, call.steps.bf16_steps)
        self.entry_logits = self.steps.entry_logits
        self.held: dict[int, KeptSlice] = {}
        again = len(self.arena) < self.count
        shape = (call.options.exponentials, self.size if again else 0)
        self.buffer = self.new_empty(shape, call.operand)

    def read(self) -> list[TailSums]:
        return [*(self._read(index)[0] for index in range(self.count)), self.steps.label_sums()]

    def _read(self, index: int) -> tuple[TailSums, KeptSlice]:
        place = self.place(index)
        sums, kept = self.steps.read(index, self.shaped(self.buffer, index) if place is None else place)
        if place is not None:
            self.held[index] = kept
        return sums, kept

    def dz(self, index: int, gradient: RowGradient) -> Tensor:
        kept = self.held.pop(index) if index in self.held else self._read(index)[1]
        return self.steps.write(kept, gradient)
