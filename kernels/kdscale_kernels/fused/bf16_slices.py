"""Slices of bf16 logits on a CPU, for the lean mode: half the time of a product, and nothing the gradient would miss.

Legend: M rows of a block, B rows at once in cache, H hidden size, V vocabulary, S entries of one slice, K teacher
entries, T temperature.

torch 2.13 has no CPU product of bf16 operands with fp32 results; fp32 operands take twice as long. A logit rounded to
bf16 is off by up to |z|·2⁻⁹, which ruins a student near its teacher in two places: at the entries, where q - p cancels,
and in the log-sum-exp. So the logits of the entries and of the label are made apart, in fp32 (K + 1 dot products a
row), and all others are rounded relative to a shift of the row: the product starts from -shift in its fp32 sum. With
the shift near the largest of them, what carries the tail's mass is rounded by as little as dz itself will be, each
entry by itself, so that the errors of the sum cancel; what is rounded by more, d nats below, counts exp(-d).
The first shift is the mean of the row's entries (near which its tail begins if the student resembles its teacher),
later ones are the largest logit so far; rows with a logit well above their shift are made again. Heads with a bias or
a soft-cap are left to fp32 results: there the largest logits need not be those whose hidden · weight is near the shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.rows.results import Found, Parts, RowGradient
from kdscale_kernels.rows.teacher_entries import Targets
from kdscale_kernels.rows.torch_slices import Places
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


# One fp32 array of the steps on a few rows: it stays in a cache, and is enough work for all threads to be worth waking
# (256 KiB: 1.7 times the wall time on two threads).
CACHED_BYTES = 2 << 20


# Nats. Up to here a logit above its shift is off by no more than 2⁻⁸ of its exponential, as a bf16 probability may be.
_RISE = 2.0


def exact_logits(hidden_MH: Tensor, weight_VH: Tensor, ids_MK: Tensor) -> Tensor:
    """hidden · weight[ids] [M,K] in fp32, some rows (of long ones, some entries) at a time."""
    (rows, entries), hidden = ids_MK.shape, hidden_MH.shape[1]
    step_k = max(1, min(entries, CACHED_BYTES // (4 * hidden)))
    step = max(1, CACHED_BYTES // (4 * hidden * step_k))
    out_MK = hidden_MH.new_empty((rows, entries), dtype=torch.float32)
    for row in range(0, rows, step):
        hidden_B1H = hidden_MH[row : row + step, None].float()
        for first in range(0, entries, step_k):
            ids_BK = ids_MK[row : row + step, first : first + step_k]
            head_BKH = weight_VH.index_select(0, ids_BK.flatten()).float().view(*ids_BK.shape, hidden)
            torch.sum(head_BKH.mul_(hidden_B1H), 2, out=out_MK[row : row + step, first : first + step_k])
    return out_MK


class Entries(NamedTuple):
    """Where a slice's entries and labels are, in it as one flat array."""

    order: Tensor  # position in the flattened [M, K]
    support: Tensor
    label_rows: Tensor
    label: Tensor
    all: Tensor  # support and label


class Kept(NamedTuple):
    """A slice's softmaxes over its tail alone: bf16, with the log-sum-exps they are relative to."""

    softmaxes: Tensor  # [1 or 2, M, S]: of z / T; of z, where its CE needs another
    tempered_M: Tensor
    one_M: Tensor
    entries: Entries


class NarrowSteps:
    """The row steps of a block of rows, slice by slice: `read` all slices in order, then `write` any."""

    def __init__(
        self,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        targets: Targets,
        labels_M: Tensor,
        options: LossOptions,
        edges: list[int],
    ):
        self.hidden_MH, self.weight_VH, self.edges, self.options = hidden_MH, weight_VH, edges, options
        self.labels_M, self.places = labels_M, Places(targets, labels_M, edges)
        z_MJ = exact_logits(hidden_MH, weight_VH, torch.cat([targets.ids_NK, labels_M[:, None]], 1))
        support_MK, self.label_M = z_MJ[:, :-1], z_MJ[:, -1]
        sum_M = support_MK.masked_fill(~targets.used_NK, 0.0).sum(1)
        self.shift_M, self.shifts = (sum_M / targets.used_NK.sum(1)).to(torch.bfloat16), list[Tensor]()
        first_MK = targets.ids_NK == targets.top1_N[:, None]
        top1_M = support_MK.masked_fill(~first_MK, _NEG_INF).amax(1)
        self.found = Found(support_MK, self.label_M, top1_M)
        self.outside_M = ~((targets.ids_NK == labels_M[:, None]) & targets.used_NK).any(1)
        widest = max(stop - first for first, stop in pairwise(edges))
        self.step = max(1, min(len(hidden_MH), CACHED_BYTES // (4 * widest)))
        self.scratch = [hidden_MH.new_empty(self.step * widest, dtype=torch.float32) for _ in range(2)]

    def label_part(self) -> Parts:
        """The label's share of the tail where it is no entry: masked out of its slice, it counts in fp32."""
        one_M = self.outside_M.float()
        return Parts(self.label_M.masked_fill(~self.outside_M, _NEG_INF), one_M, one_M)

    def read(self, index: int, keep: Tensor) -> tuple[Parts, Kept]:
        """The parts of slice `index`'s tail, and its softmaxes in `keep`: [options.exponentials, M, S] of bf16.

        A second call for the same slice makes the same again.
        """
        entries = self._entries(index)
        self._logits(index, self.hidden_MH, self._shift(index), keep[0]).view(-1)[entries.all] = _NEG_INF
        parts = self._softmaxes(index, self._shift(index), keep)
        if index == len(self.shifts):
            self._rise(index, keep, parts, entries.all)
        none_M = parts.top_C == _NEG_INF  # nothing but entries: no softmax of it
        if bool(none_M.any()):
            parts = Parts(parts.top_C, *(sum_M.masked_fill(none_M, 0.0) for sum_M in parts[1:]))
            keep[:, none_M] = 0.0
        finite_M = parts.top_C.masked_fill(none_M, 0.0)
        tempered_M, one_M = (
            (finite_M / T + sum_M.log()).masked_fill(none_M, 0.0)
            for T, sum_M in ((self.options.temperature, parts.tempered_C), (1.0, parts.one_C))
        )
        return parts, Kept(keep, tempered_M, one_M, entries)

    def _shift(self, index: int) -> Tensor:
        return self.shifts[index] if index < len(self.shifts) else self.shift_M

    def _rise(self, index: int, keep: Tensor, parts: Parts, masked: Tensor) -> None:
        """Again, with a shift that fits, where a row's largest logit is far above the one it was given."""
        shift_M, top_M, width = self.shift_M, parts.top_C, keep.shape[2]
        seen_M = torch.where(top_M.isfinite(), top_M, shift_M.float()).to(torch.bfloat16)
        high = (seen_M.float() - shift_M.float() > _RISE).nonzero()[:, 0]
        shift_M = shift_M.index_copy(0, high, seen_M[high])
        for rows_R in high.split(max(self.step, len(top_M) // 8)):
            again = keep.new_empty(keep.shape[0], len(rows_R), width)
            place_M = torch.full_like(self.labels_M, -1).index_copy_(0, rows_R, torch.arange(len(rows_R)))
            entry_R = place_M[masked // width]
            self._logits(index, self.hidden_MH[rows_R], shift_M[rows_R], again[0])
            again[0].view(-1)[(entry_R * width + masked % width)[entry_R >= 0]] = _NEG_INF
            made = self._softmaxes(index, shift_M[rows_R], again)
            keep[:, rows_R] = again
            for field_M, field_R in zip(parts, made, strict=True):
                field_M[rows_R] = field_R
        self.shifts.append(shift_M)
        self.shift_M = torch.maximum(shift_M, seen_M) if index else seen_M

    def _softmaxes(self, index: int, shift_R: Tensor, keep: Tensor) -> Parts:
        """Of some rows' slice, from keep[0] (its logits less the shift) into `keep`."""
        T = self.options.temperature
        made = Parts(*shift_R.new_empty((3, len(shift_R)), dtype=torch.float32).unbind())
        for part, z_BS, soft_BS in self._blocks(index, len(shift_R)):
            z_BS.copy_(keep[0, part])
            torch.amax(z_BS, 1, out=made.top_C[part])
            made.top_C[part] += shift_R[part]
            if T != 1.0:
                softmax_and_sum(z_BS, soft_BS, made.one_C[part])
                if len(keep) > 1:
                    keep[1, part] = soft_BS
                z_BS.div_(T)
            softmax_and_sum(z_BS, soft_BS, made.tempered_C[part])
            keep[0, part] = soft_BS
        if T == 1.0:
            made.one_C.copy_(made.tempered_C)
        return made

    def write(self, kept: Kept, index: int, gradient: RowGradient) -> Tensor:
        """dz [M,S], over kept.softmaxes[0]."""
        factor_M = gradient.a_C * torch.exp(kept.tempered_M - gradient.tail_C)
        other_M = gradient.b * torch.exp(kept.one_M - gradient.lse_C)
        dz_MS = kept.softmaxes[0]
        for part, dz_BS, other_BS in self._blocks(index, len(dz_MS)):
            dz_BS.copy_(dz_MS[part]).mul_(factor_M[part, None])
            if len(kept.softmaxes) > 1:
                dz_BS.addcmul_(other_BS.copy_(kept.softmaxes[1][part]), other_M[part, None])
            dz_MS[part] = dz_BS
        entries, flat = kept.entries, dz_MS.view(-1)
        flat[entries.label] = self._label_values(gradient)[entries.label_rows].to(flat.dtype)
        flat[entries.support] = gradient.values_CK.flatten()[entries.order].to(flat.dtype)
        return dz_MS

    def _label_values(self, gradient: RowGradient) -> Tensor:
        z_M, T = self.label_M, self.options.temperature
        value_M = gradient.a_C * torch.exp(z_M / T - gradient.tail_C)
        if gradient.b:
            value_M = value_M + gradient.b * torch.exp(z_M - gradient.lse_C)
        return value_M if gradient.label_C is None else value_M + gradient.label_C

    def _logits(self, index: int, hidden_RH: Tensor, shift_R: Tensor, out_RS: Tensor) -> Tensor:
        """Logits less the shift, rounded to bf16."""
        weight_SH = self.weight_VH[self.edges[index] : self.edges[index + 1]]
        return torch.addmm(-shift_R[:, None], hidden_RH, weight_SH.T, out=out_RS)

    def _entries(self, index: int) -> Entries:
        first, stop = self.edges[index : index + 2]
        order, row, column = self.places.of(index)
        rows = (self.outside_M & (self.labels_M >= first) & (self.labels_M < stop)).nonzero()[:, 0]
        width = stop - first
        support, label = row * width + column, rows * width + self.labels_M[rows] - first
        return Entries(order, support, rows, label, torch.cat([support, label]))

    def _blocks(self, index: int, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(some of the rows, two fp32 arrays [B,S])."""
        width = self.edges[index + 1] - self.edges[index]
        for begin in range(0, rows, self.step):
            part = slice(begin, min(begin + self.step, rows))
            shape = (part.stop - begin, width)
            first, second = (s[: shape[0] * width].view(shape) for s in self.scratch)
            yield part, first, second


def softmax_and_sum(z_BS: Tensor, out_BS: Tensor, sum_B: Tensor) -> None:
    """softmax(z), and the sum of exp(z - max) in sum_B: one over the largest probability."""
    torch.softmax(z_BS, 1, out=out_BS)
    torch.amax(out_BS, 1, out=sum_B)
    sum_B.reciprocal_()
