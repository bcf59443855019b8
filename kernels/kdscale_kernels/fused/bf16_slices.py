"""Vocabulary slices of bf16 logits on a CPU: products in half the time, and nothing lost that the gradient needs.

Legend: M rows of a block, R rows computed again, H hidden size, V vocabulary, S entries of one
slice, K teacher entries, J = K + 1 (with the label), T temperature.

torch 2.13 has no CPU product of bf16 operands with fp32 results, and fp32 operands take twice as long. A logit rounded
to bf16 is off by up to |z|·2⁻⁹, which ruins a student near its teacher in two places: at the entries, where q - p
cancels, and in the log-sum-exp. So the logits of the entries and of the label are computed apart, in fp32 (K + 1 dot
products per row), and all others are rounded relative to a shift of the row: the product starts from -shift in its fp32
sum. With the shift near the largest logits, what carries the tail's mass is rounded by as little as dz itself will be,
and each entry by itself, so that the errors of the sum cancel; a logit d nats below is rounded by more and counts
exp(-d). The first shift is the mean of the row's entries (near which the tail begins if the student resembles its
teacher), later ones are the largest logit so far; rows with a logit well above their shift are computed again. Heads
with a bias or a soft-cap keep fp32 results: there the largest logits need not be those whose hidden · weight is near
the shift.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.rows.results import EntryLogits, RowGradient, TailSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.rows.torch_slices import EntryPlaces
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")
# Nats. Up to here a logit above its shift is off by no more than 2⁻⁸ of its exponential, as a bf16 probability may be.
_RISE = 2.0


class SliceEntries(NamedTuple):
    """Where a slice's entries and labels lie in the slice as one flat array."""

    order: Tensor  # position in the flattened [M, K]
    support: Tensor
    label_rows: Tensor
    label: Tensor
    all: Tensor  # support and label


class KeptSlice(NamedTuple):
    """A slice's exponentials over its tail alone, in bf16, each relative to something of its row."""

    exponentials: Tensor  # [1 or 2, M, S]: exp(z / T - tempered); exp(z - plain), where its CE needs another
    tempered_M: Tensor
    plain_M: Tensor
    entries: SliceEntries


class Bf16Slices:
    """The sparse step for a block of rows, slice by slice: `read` all slices in order, then `write` any."""

    def __init__(
        self,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        teacher: TeacherEntries,
        labels_M: Tensor,
        options: LossOptions,
        edges: list[int],
        steps: Bf16Steps,
    ):
        self.hidden_MH, self.weight_VH, self.edges = hidden_MH, weight_VH, edges
        self.options, self.steps = options, steps
        self.labels_M, self.places = labels_M, EntryPlaces(teacher, labels_M, edges)
        z_MJ = steps.dots(hidden_MH, weight_VH, torch.cat([teacher.ids_NK, labels_M[:, None]], 1))
        support_MK, self.label_M = z_MJ[:, :-1], z_MJ[:, -1]
        sum_M = support_MK.masked_fill(~teacher.used_NK, 0.0).sum(1)
        self.shift_M, self.shifts = (sum_M / teacher.used_NK.sum(1)).to(torch.bfloat16), list[Tensor]()
        first_MK = teacher.ids_NK == teacher.top1_N[:, None]
        top1_M = support_MK.masked_fill(~first_MK, _NEG_INF).amax(1)
        self.entry_logits = EntryLogits(support_MK, self.label_M, top1_M)
        self.outside_M = ~((teacher.ids_NK == labels_M[:, None]) & teacher.used_NK).any(1)

    def label_sums(self) -> TailSums:
        """What the label adds to the tail where it is no entry: it is masked in its slice and counts in fp32."""
        plain_M = self.outside_M.float()
        return TailSums(self.label_M.masked_fill(~self.outside_M, _NEG_INF), plain_M, plain_M)

    def read(self, index: int, keep: Tensor) -> tuple[TailSums, KeptSlice]:
        """The sums of slice `index` over its tail, and its exponentials in `keep` [options.exponentials, M, S], bf16.

        A second call for the same slice gives the same again.
        """
        entries = self._entries(index)
        self._logits(index, self.hidden_MH, self._shift(index), keep[0]).view(-1)[entries.all] = _NEG_INF
        sums = self._exponentials(self._shift(index), keep)
        if index == len(self.shifts):
            self._rise(index, keep, sums, entries.all)
        none_M = sums.top_C == _NEG_INF  # the slice holds only entries of this row
        if bool(none_M.any()):
            sums = TailSums(sums.top_C, *(sum_M.masked_fill(none_M, 0.0) for sum_M in sums[1:]))
            keep[:, none_M] = 0.0
        finite_M = sums.top_C.masked_fill(none_M, 0.0)
        tempered_M, plain_M = finite_M / self.options.temperature, finite_M
        if self.steps.leaves_softmaxes:
            tempered_M = (tempered_M + sums.tempered_C.log()).masked_fill(none_M, 0.0)
            plain_M = (plain_M + sums.plain_C.log()).masked_fill(none_M, 0.0)
        return sums, KeptSlice(keep, tempered_M, plain_M, entries)

    def _shift(self, index: int) -> Tensor:
        return self.shifts[index] if index < len(self.shifts) else self.shift_M

    def _rise(self, index: int, keep: Tensor, sums: TailSums, masked: Tensor) -> None:
        """Compute rows again, with a shift that fits, whose largest logit is far above the shift they had."""
        shift_M, top_M, width = self.shift_M, sums.top_C, keep.shape[2]
        seen_M = torch.where(top_M.isfinite(), top_M, shift_M.float()).to(torch.bfloat16)
        high = (seen_M.float() - shift_M.float() > _RISE).nonzero()[:, 0]
        shift_M = shift_M.index_copy(0, high, seen_M[high])
        for rows_R in high.split(max(1, len(top_M) // 8)):
            again = keep.new_empty(keep.shape[0], len(rows_R), width)
            place_M = torch.full_like(self.labels_M, -1).index_copy_(0, rows_R, torch.arange(len(rows_R)))
            entry_R = place_M[masked // width]
            self._logits(index, self.hidden_MH[rows_R], shift_M[rows_R], again[0])
            again[0].view(-1)[(entry_R * width + masked % width)[entry_R >= 0]] = _NEG_INF
            sums_R = self._exponentials(shift_M[rows_R], again)
            keep[:, rows_R] = again
            for field_M, field_R in zip(sums, sums_R, strict=True):
                field_M[rows_R] = field_R
        self.shifts.append(shift_M)
        self.shift_M = torch.maximum(shift_M, seen_M) if index else seen_M

    def _exponentials(self, shift_R: Tensor, keep: Tensor) -> TailSums:
        """Turn keep[0], a slice's logits less the shift, into exponentials in `keep`; their sums."""
        sums = self.steps.exponentials(keep[0], keep[1] if len(keep) > 1 else None, self.options.temperature)
        return sums._replace(top_C=sums.top_C.add_(shift_R))

    def write(self, kept: KeptSlice, gradient: RowGradient) -> Tensor:
        """dz [M,S] of the slice, in the memory of kept.exponentials[0]."""
        factor_M = gradient.a_C * torch.exp(kept.tempered_M - gradient.tail_C)
        other_M = gradient.b * torch.exp(kept.plain_M - gradient.lse_C)
        dz_MS, *others = kept.exponentials
        self.steps.scale(dz_MS, factor_M, *((others[0], other_M) if others else ()))
        entries, flat = kept.entries, dz_MS.view(-1)
        flat[entries.label] = self._label_values(gradient)[entries.label_rows].to(flat.dtype)
        flat[entries.support] = gradient.values_CK.flatten()[entries.order].to(flat.dtype)
        return dz_MS

    def _label_values(self, gradient: RowGradient) -> Tensor:
        z_M, T = self.label_M, self.options.temperature
        value_M = gradient.a_C * torch.exp(z_M / T - gradient.tail_C)
        if gradient.has_plain:
            value_M = value_M + gradient.b * torch.exp(z_M - gradient.lse_C)
        return value_M if gradient.label_C is None else value_M + gradient.label_C

    def _logits(self, index: int, hidden_RH: Tensor, shift_R: Tensor, out_RS: Tensor) -> Tensor:
        """Logits [R,S] of slice `index` less the shift, rounded to bf16."""
        weight_SH = self.weight_VH[self.edges[index] : self.edges[index + 1]]
        return torch.addmm(-shift_R[:, None], hidden_RH, weight_SH.T, out=out_RS)

    def _entries(self, index: int) -> SliceEntries:
        first, stop = self.edges[index : index + 2]
        order, row, column = self.places.of(index)
        rows = (self.outside_M & (self.labels_M >= first) & (self.labels_M < stop)).nonzero()[:, 0]
        width = stop - first
        support, label = row * width + column, rows * width + self.labels_M[rows] - first
        return SliceEntries(order, support, rows, label, torch.cat([support, label]))
