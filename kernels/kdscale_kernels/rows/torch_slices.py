"""The sparse step when a row's logits come a slice of the vocabulary at a time, or lie on several ranks.

Legend: C rows, V vocabulary, S entries of one slice, R slices of a row, K teacher entries, T temperature.

The slices are passed over twice. `read` looks up the entries that lie in a slice, masks them, and sums what is left of
the row: each slice shifts by its own maximum, so that no shared row constant can be too far off. `join_slices` puts the
slices together, in order, and has the losses and what each row's gradient is made of. `write` then makes dz:

    dz_j = a·exp(z_j / T - tail) + b·exp(z_j - lse) - ce_weight·[j is the label],  and K values over the entries,

with tail the log-sum-exp of the tempered tail and lse the one of the row at temperature 1 (torch_sparse.py says why).
`write_kept` makes it from exponentials kept as dz will be rounded: in bf16 they cost half of what logits would, and
unlike a rounded logit they lose nothing that dz would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale_kernels.rows.results import EntryLogits, RowGradient, RowSums, SliceExponentials, TailSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.rows.torch_sparse import bucket_step, column, mix
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


class EntryPlaces:
    """Where the entries of all rows lie, slice by slice: sorted once, so that a slice touches only its own."""

    def __init__(self, entries: TeacherEntries, labels_C: Tensor, edges: Sequence[int]):
        """Slice i is edges[i] to edges[i + 1] of the vocabulary. Waits for the device once."""
        self.labels_C, self.top1_C, self._edges = labels_C, entries.top1_N, list(edges)
        keys = entries.ids_NK.masked_fill(~entries.used_NK, torch.iinfo(torch.int64).max).flatten()
        self._ids, self._order = keys.sort()
        self._rows = self._order // max(entries.ids_NK.shape[1], 1)
        at_R = torch.tensor(self._edges).to(keys.device, non_blocking=True)
        self._bounds = torch.searchsorted(self._ids, at_R).tolist()

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(position in the flattened [C, K], row, column in the slice) of each entry that lies in slice `index`."""
        inside = slice(self._bounds[index], self._bounds[index + 1])
        return self._order[inside], self._rows[inside], self._ids[inside] - self._edges[index]

    def column_of(self, ids_C: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(column in slice `index`, clamped into it, [C,1]; True where the id lies there, [C])."""
        first, stop = self._edges[index : index + 2]
        return (ids_C - first).clamp(0, stop - first - 1)[:, None], (ids_C >= first) & (ids_C < stop)


class TorchSlices:
    """row_steps.SliceSteps in torch."""

    def __init__(self, entries: TeacherEntries, labels_C: Tensor, options: LossOptions, edges: Sequence[int]):
        self._places, self._options = EntryPlaces(entries, labels_C, edges), options

    def read(
        self, z_CS: Tensor, index: int, entry_logits: EntryLogits, keep: Sequence[Tensor] = ()
    ) -> tuple[TailSums, SliceExponentials | None]:
        """See SliceSteps.read."""
        options, places = self._options, self._places
        if options.softcap is not None:
            z_CS.div_(options.softcap).tanh_().mul_(options.softcap)
        position, row, column = places.of(index)
        entry_logits.support_CK.view(-1)[position] = z_CS[row, column]
        for ids_C, into_C in ((places.labels_C, entry_logits.label_C), (places.top1_C, entry_logits.top1_C)):
            column_C1, here_C = places.column_of(ids_C, index)
            into_C.copy_(torch.where(here_C, z_CS.gather(1, column_C1)[:, 0], into_C))
        z_CS[row, column] = _NEG_INF
        square_CS = None
        if keep and options.softcap is not None:
            square_CS = (z_CS / options.softcap).square_()
        top_C = z_CS.amax(1)
        shift_C = top_C.masked_fill(top_C == _NEG_INF, 0.0)
        z_CS.sub_(shift_C[:, None])
        plain_CS = z_CS.exp() if options.temperature != 1.0 else None
        tempered_CS = z_CS.div_(options.temperature).exp_() if plain_CS is not None else z_CS.exp_()
        tempered_C = tempered_CS.sum(1)
        sums = TailSums(top_C, tempered_C if plain_CS is None else plain_CS.sum(1), tempered_C)
        if not keep:
            return sums, None
        for into_CS, e_CS in zip(keep, (tempered_CS, plain_CS), strict=False):
            assert e_CS is not None
            into_CS.copy_(e_CS if square_CS is None else e_CS.addcmul_(e_CS, square_CS, value=-1.0))
        return sums, SliceExponentials(tuple(keep), shift_C)

    def write(self, z_CS: Tensor, index: int, gradient: RowGradient, grad_dtype: torch.dtype) -> Tensor:
        """See SliceSteps.write."""
        T, softcap = self._options.temperature, self._options.softcap
        if softcap is not None:
            z_CS.div_(softcap).tanh_().mul_(softcap)
        square_CS = (z_CS / softcap).square_() if softcap is not None else None
        plain_CS = torch.exp(z_CS - gradient.lse_C[:, None]) if gradient.has_plain else None
        if T != 1.0:
            z_CS.div_(T)
        z_CS.sub_(gradient.tail_C[:, None]).exp_().mul_(gradient.a_C[:, None])
        if plain_CS is not None:
            z_CS.add_(plain_CS.mul_(column(gradient.b)))
        if square_CS is not None:
            z_CS.addcmul_(z_CS, square_CS, value=-1.0)
        self._write_entries(z_CS, index, gradient)
        return z_CS.to(grad_dtype)

    def write_kept(self, kept: SliceExponentials, index: int, gradient: RowGradient) -> Tensor:
        """See SliceSteps.write_kept."""
        T, tempered_CS = self._options.temperature, kept.exponentials[0]
        dz_CS = tempered_CS.to(kept.top_C.dtype)
        dz_CS.mul_((gradient.a_C * torch.exp(kept.top_C / T - gradient.tail_C))[:, None])
        for plain_CS in kept.exponentials[1:]:
            factor_C = gradient.b * torch.exp(kept.top_C - gradient.lse_C)
            dz_CS.addcmul_(plain_CS.to(dz_CS.dtype), factor_C[:, None])
        self._write_entries(dz_CS, index, gradient)
        return dz_CS.to(tempered_CS.dtype)

    def _write_entries(self, dz_CS: Tensor, index: int, gradient: RowGradient) -> None:
        """Add the label's part, then overwrite the entries."""
        if gradient.label_C is not None:
            column_C1, here_C = self._places.column_of(self._places.labels_C, index)
            dz_CS.scatter_add_(1, column_C1, torch.where(here_C, gradient.label_C, 0.0)[:, None])
        position, row, column = self._places.of(index)
        dz_CS[row, column] = gradient.values_CK.flatten()[position]


def join_slices(
    entry_logits: EntryLogits, tail: TailSums, entries: TeacherEntries, labels_C: Tensor, options: LossOptions
) -> tuple[RowSums, RowGradient]:
    """The rows' results from the sums of all slices, each [C, R]."""
    T, ce_weight = options.temperature, entries.ce_weight(options)
    support_CK = entry_logits.support_CK.masked_fill(~entries.used_NK, _NEG_INF)
    top_C = tail.top_C.amax(1)
    gap_CR = tail.top_C - top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None]
    plain_sum_C = (torch.exp(gap_CR) * tail.plain_C).sum(1)
    tempered_sum_C = (torch.exp(gap_CR / T) * tail.tempered_C).sum(1)

    agree_C = (entry_logits.top1_C >= torch.maximum(top_C, support_CK.amax(1))).to(support_CK.dtype)
    plain_lse_C = torch.logaddexp(torch.logsumexp(support_CK, 1), top_C + plain_sum_C.log())
    ce_C = plain_lse_C - entry_logits.label_C
    tail_C = top_C / T + tempered_sum_C.log()
    kd_C, grad_CB, student_tail_C = bucket_step(support_CK / T, tail_C, entries, options)
    loss_C = mix(ce_weight, ce_C, T * T * kd_C)
    sums = RowSums(loss_C, kd_C, ce_C, entries.logp_NK.exp().sum(1), student_tail_C, agree_C)

    kd_scale = (1.0 - ce_weight) * T
    values_CK, a_C = column(kd_scale) * grad_CB[:, :-1], kd_scale * grad_CB[:, -1]
    shift_C = tail_C.masked_fill(tail_C == _NEG_INF, 0.0)
    if options.ce_weight > 0.0:
        at_label_CK = entries.used_NK & (entries.ids_NK == labels_C[:, None])
        of_ce_CK = torch.exp(support_CK - plain_lse_C[:, None]) - at_label_CK.to(a_C.dtype)
        values_CK = values_CK + column(ce_weight) * of_ce_CK
        if T == 1.0:  # one exponential serves as both softmaxes
            a_C = a_C + ce_weight * torch.exp(shift_C - plain_lse_C)
    if options.softcap is not None:
        values_CK = values_CK * (1.0 - (entry_logits.support_CK / options.softcap).square())
    label_C = None
    if options.ce_weight > 0.0:
        cap = options.softcap or float("inf")
        label_C = -ce_weight * (1.0 - (entry_logits.label_C / cap).square())
    b = ce_weight if T != 1.0 else 0.0
    return sums, RowGradient(values_CK, shift_C, torch.where(loss_C.isnan(), loss_C, a_C), plain_lse_C, b, label_C)
