"""The row step when a row's logits come a slice of the vocabulary at a time: in lean mode, or on another rank.

Legend: C rows, V vocabulary, S entries of one slice, R slices of a row, K teacher entries, T temperature.

Twice over the slices. `read_slice` looks up the entries that lie in the slice, masks them, and sums what is left of the
row: each slice shifts by its own maximum, so that no shared row constant can be too far off. `join` puts the slices
together, in order, and has the losses and, for each row, what its gradient is made of; `write_slice` then makes dz:

    dz_j = a·exp(z_j / T - tail) + b·exp(z_j - lse) - ce_weight·[j is the label],  and K values over the entries,

with tail the log-sum-exp of the tempered tail and lse the one of the whole row at temperature 1 (rows.py says why).
`write_kept` makes it from exponentials kept as dz will be rounded: in bf16 they cost half of what logits would, and
unlike a rounded logit they lose nothing that dz would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale_kernels.rows.results import Found, Kept, Parts, RowGradient, RowSums
from kdscale_kernels.rows.teacher_entries import Targets
from kdscale_kernels.rows.torch_sparse import bucket_step, mix
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


class Places:
    """Where the entries of all rows lie, slice by slice: sorted once, so that a slice touches its own only."""

    def __init__(self, targets: Targets, labels_C: Tensor, edges: Sequence[int]):
        """Slice i is edges[i] to edges[i + 1] of the vocabulary. Waits for the device once."""
        self.labels_C, self.top1_C, self._edges = labels_C, targets.top1_N, list(edges)
        keys = targets.ids_NK.masked_fill(~targets.used_NK, torch.iinfo(torch.int64).max).flatten()
        self._ids, self._order = keys.sort()
        self._rows = self._order // max(targets.ids_NK.shape[1], 1)
        self._bounds = torch.searchsorted(self._ids, torch.tensor(self._edges, device=keys.device)).tolist()

    def of(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(position in the flattened [C, K], row, column in the slice) of each entry that lies in slice `index`."""
        part = slice(self._bounds[index], self._bounds[index + 1])
        return self._order[part], self._rows[part], self._ids[part] - self._edges[index]

    def one(self, ids_C: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(column in slice `index`, clamped into it, [C,1]; True where the id lies there, [C])."""
        first, stop = self._edges[index : index + 2]
        return (ids_C - first).clamp(0, stop - first - 1)[:, None], (ids_C >= first) & (ids_C < stop)


def read_slice(
    z_CS: Tensor, index: int, places: Places, found: Found, options: LossOptions, keep: Sequence[Tensor] = ()
) -> tuple[Parts, Kept | None]:
    """Enter what slice `index` holds into `found`; its tail's parts and, with `keep`, what makes its dz without z.

    z_CS (raw logits) is destroyed. keep: arrays [C, S] to keep in, as many as options.exponentials.
    """
    if options.softcap is not None:
        z_CS.div_(options.softcap).tanh_().mul_(options.softcap)
    position, row, column = places.of(index)
    found.support_CK.view(-1)[position] = z_CS[row, column]
    for ids_C, into_C in ((places.labels_C, found.label_C), (places.top1_C, found.top1_C)):
        place_C1, here_C = places.one(ids_C, index)
        into_C.copy_(torch.where(here_C, z_CS.gather(1, place_C1)[:, 0], into_C))
    z_CS[row, column] = _NEG_INF
    square_CS = None
    if keep and options.softcap is not None:
        square_CS = (z_CS / options.softcap).square_()
    top_C = z_CS.amax(1)
    shift_C = top_C.masked_fill(top_C == _NEG_INF, 0.0)
    z_CS.sub_(shift_C[:, None])
    one_CS = z_CS.exp() if options.temperature != 1.0 else None
    tempered_CS = z_CS.div_(options.temperature).exp_() if one_CS is not None else z_CS.exp_()
    tempered_C = tempered_CS.sum(1)
    parts = Parts(top_C, tempered_C if one_CS is None else one_CS.sum(1), tempered_C)
    if not keep:
        return parts, None
    for into_CS, e_CS in zip(keep, (tempered_CS, one_CS), strict=False):
        assert e_CS is not None
        into_CS.copy_(e_CS if square_CS is None else e_CS.addcmul_(e_CS, square_CS, value=-1.0))
    return parts, Kept(tuple(keep), shift_C)


def join(
    found: Found, parts: Parts, targets: Targets, labels_C: Tensor, options: LossOptions
) -> tuple[RowSums, RowGradient]:
    """The rows' results from all slices' parts, each [C, R]."""
    T, ce_weight = options.temperature, options.ce_weight
    support_CK = found.support_CK.masked_fill(~targets.used_NK, _NEG_INF)
    top_C = parts.top_C.amax(1)
    gap_CR = parts.top_C - top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None]
    one_sum_C = (torch.exp(gap_CR) * parts.one_C).sum(1)
    tempered_sum_C = (torch.exp(gap_CR / T) * parts.tempered_C).sum(1)

    agree_C = (found.top1_C >= torch.maximum(top_C, support_CK.amax(1))).to(support_CK.dtype)
    lse_one_C = torch.logaddexp(torch.logsumexp(support_CK, 1), top_C + one_sum_C.log())
    ce_C = lse_one_C - found.label_C
    tail_C = top_C / T + tempered_sum_C.log()
    kd_C, grad_CB, student_tail_C = bucket_step(support_CK / T, tail_C, targets, options)
    loss_C = mix(ce_weight, ce_C, T * T * kd_C)
    sums = RowSums(loss_C, kd_C, ce_C, targets.logp_NK.exp().sum(1), student_tail_C, agree_C)

    kd_scale = (1.0 - ce_weight) * T
    values_CK, a_C = kd_scale * grad_CB[:, :-1], kd_scale * grad_CB[:, -1]
    shift_C = tail_C.masked_fill(tail_C == _NEG_INF, 0.0)
    if ce_weight > 0.0:
        at_label_CK = targets.used_NK & (targets.ids_NK == labels_C[:, None])
        values_CK = values_CK + ce_weight * (torch.exp(support_CK - lse_one_C[:, None]) - at_label_CK.to(a_C.dtype))
        if T == 1.0:  # one exponential is both softmaxes
            a_C = a_C + ce_weight * torch.exp(shift_C - lse_one_C)
    if options.softcap is not None:
        values_CK = values_CK * (1.0 - (found.support_CK / options.softcap).square())
    label_C = None
    if ce_weight > 0.0:
        cap = options.softcap or float("inf")
        label_C = -ce_weight * (1.0 - (found.label_C / cap).square())
    b = ce_weight if T != 1.0 else 0.0
    return sums, RowGradient(values_CK, shift_C, torch.where(loss_C.isnan(), loss_C, a_C), lse_one_C, b, label_C)


def write_slice(z_CS: Tensor, index: int, places: Places, gradient: RowGradient, options: LossOptions) -> None:
    """Turn the slice's raw logits into dz, in place."""
    if options.softcap is not None:
        z_CS.div_(options.softcap).tanh_().mul_(options.softcap)
    square_CS = (z_CS / options.softcap).square_() if options.softcap is not None else None
    one_CS = torch.exp(z_CS - gradient.lse_C[:, None]) if gradient.b else None
    if options.temperature != 1.0:
        z_CS.div_(options.temperature)
    z_CS.sub_(gradient.tail_C[:, None]).exp_().mul_(gradient.a_C[:, None])
    if one_CS is not None:
        z_CS.add_(one_CS, alpha=gradient.b)
    if square_CS is not None:
        z_CS.addcmul_(z_CS, square_CS, value=-1.0)
    _write_entries(z_CS, index, places, gradient)


def write_kept(kept: Kept, index: int, places: Places, gradient: RowGradient, options: LossOptions) -> Tensor:
    """write_slice from what read_slice kept; dz in the dtype it was kept in."""
    T, tempered_CS = options.temperature, kept.exponentials[0]
    dz_CS = tempered_CS.to(kept.top_C.dtype)
    dz_CS.mul_((gradient.a_C * torch.exp(kept.top_C / T - gradient.tail_C))[:, None])
    for one_CS in kept.exponentials[1:]:
        factor_C = gradient.b * torch.exp(kept.top_C - gradient.lse_C)
        dz_CS.addcmul_(one_CS.to(dz_CS.dtype), factor_C[:, None])
    _write_entries(dz_CS, index, places, gradient)
    return dz_CS.to(tempered_CS.dtype)


def _write_entries(dz_CS: Tensor, index: int, places: Places, gradient: RowGradient) -> None:
    """The label's part, then the entries: whatever earlier steps made of those goes."""
    if gradient.label_C is not None:
        place_C1, here_C = places.one(places.labels_C, index)
        dz_CS.scatter_add_(1, place_C1, torch.where(here_C, gradient.label_C, 0.0)[:, None])
    position, row, column = places.of(index)
    dz_CS[row, column] = gradient.values_CK.flatten()[position]
