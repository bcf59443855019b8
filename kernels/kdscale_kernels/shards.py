"""The row step of a head split over ranks by vocabulary: local logits in, the whole softmax's loss and gradient out.

Legend: C rows of one chunk, V entries of this rank's shard, R ranks, K teacher entries, J = K + 2 looked-up logits,
P = J + 3·R numbers a row on their way round the ranks, B = K + 1 buckets, T temperature.

A row's softmax needs what all ranks hold, so each sends, in one SUM all-reduce a chunk, the student's logits at the
entries it owns (zero elsewhere) and, in a slot of its own, the maximum and the sums of exponentials of its part of the
tail. Slots make the sum an exchange: each rank shifts by its own maximum and they are joined afterwards, in rank order.
So no MAX all-reduce is needed, and no row constant shared by all ranks either, which would be too far off wherever
part of the student's tail lies 88 nats from it. It costs 3·R numbers a row, next to K.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kdscale_kernels.groups import Shard
from kdscale_kernels.products import Head
from kdscale_kernels.rows import RowSums, _bucket_step, _mix, cap_
from kdscale_kernels.targets import Targets
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


class ShardHead(Head):
    """A shard's products. One that is all padding stands in as a single row of zeros with logits of -inf."""

    def __init__(
        self,
        weight_VsH: Tensor,
        bias_Vs: Tensor | None,
        operand: torch.dtype,
        accumulate: torch.dtype,
        shard: Shard,
        options: LossOptions,
    ):
        self.empty, self.width, self.softcap = shard.used == 0, max(shard.used, 1), options.softcap
        if self.empty:
            weight_VsH, bias_Vs = weight_VsH.new_zeros(1, weight_VsH.shape[1]), None
        super().__init__(weight_VsH, bias_Vs, operand, accumulate, self.width)

    def logits(self, hidden_CH: Tensor, out_CV: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """(capped logits, tanh² of the cap or None)."""
        z_CV = super().logits(hidden_CH, out_CV)
        slope_CV = cap_(z_CV, self.softcap) if self.softcap is not None else None
        return (z_CV.fill_(_NEG_INF) if self.empty else z_CV), slope_CV


def shifted(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(row maxima, z minus them in place; a row of -inf stays)."""
    top_C = z_CV.amax(1)
    return top_C, z_CV.sub_(top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None])


def _gaps(tops_CR: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest of the ranks' maxima [C], how far below it each lies [C,R])."""
    top_C = tops_CR.amax(1)
    return top_C, tops_CR - top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None]


def joined_lse(tops_CR: Tensor, sums_CR: Tensor, temperature: float) -> Tensor:
    """logsumexp(z / T) [C] from each rank's maximum and its sum of exp((z - maximum) / T)."""
    top_C, gap_CR = _gaps(tops_CR)
    return top_C / temperature + (torch.exp(gap_CR / temperature) * sums_CR).sum(1).log()


class _Joined:
    """What a chunk's SUM all-reduce brings back, equal on all ranks, joined from the slots."""

    def __init__(self, partial_CP: Tensor, entries: int, shard: Shard, temperature: float):
        dist.all_reduce(partial_CP, group=shard.group)
        self.support_CK, self.label_C, self.top1_C = (
            partial_CP[:, :entries],
            partial_CP[:, entries],
            partial_CP[:, entries + 1],
        )
        tops_CR, ones_CR, tempereds_CR = partial_CP[:, entries + 2 :].unflatten(1, (shard.ranks, 3)).unbind(2)
        self.top_C, gap_CR = _gaps(tops_CR)
        self.one_sum_C = (torch.exp(gap_CR) * ones_CR).sum(1)
        self.tempered_sum_C = (torch.exp(gap_CR / temperature) * tempereds_CR).sum(1)
        self.gap_C = gap_CR[:, shard.rank]


def shard_rows_step(
    z_CV: Tensor,
    slope_CV: Tensor | None,
    targets: Targets,
    labels_C: Tensor,
    options: LossOptions,
    shard: Shard,
    *,
    want_grad: bool,
) -> RowSums:
    """rows.rows_step with the vocabulary split: z_CV is this shard's capped logits and becomes its dloss/dz.

    Writes are additions of a value to one owner and of zero elsewhere: an id of another shard needs an index too.
    """
    T, ce_weight = options.temperature, options.ce_weight
    index_CK, mine_CK = shard.local(targets.ids_NK)
    mine_CK = mine_CK & targets.used_NK
    z_of = torch.cat([targets.ids_NK, labels_C[:, None], targets.top1_N[:, None]], 1)
    place_CJ, here_CJ = shard.local(z_of)
    found_CJ = z_CV.gather(1, place_CJ).masked_fill(~here_CJ, 0.0)

    z_CV.scatter_add_(1, index_CK, torch.where(mine_CK, _NEG_INF, 0.0).to(z_CV.dtype))
    own_top_C, z_CV = shifted(z_CV)
    one_CV = torch.exp(z_CV) if T != 1.0 else z_CV.exp_()
    tempered_CV = z_CV.div_(T).exp_() if T != 1.0 else one_CV
    slots_CR3 = z_CV.new_zeros(z_CV.shape[0], shard.ranks, 3)
    slots_CR3[:, shard.rank] = torch.stack([own_top_C, one_CV.sum(1), tempered_CV.sum(1)], 1)
    all_ = _Joined(torch.cat([found_CJ, slots_CR3.flatten(1)], 1), index_CK.shape[1], shard, T)

    support_CK = all_.support_CK.masked_fill(~targets.used_NK, _NEG_INF)
    agree_C = (all_.top1_C >= torch.maximum(all_.top_C, support_CK.amax(1))).to(z_CV.dtype)
    tail_one_C = all_.top_C + all_.one_sum_C.log()
    lse_one_C = torch.logaddexp(torch.logsumexp(support_CK, 1), tail_one_C)
    ce_C = lse_one_C - all_.label_C
    tail_C = all_.top_C / T + all_.tempered_sum_C.log()
    kd_C, grad_CB, student_tail_C = _bucket_step(support_CK / T, tail_C, targets, options)
    sums = RowSums(
        _mix(ce_weight, ce_C, T * T * kd_C), kd_C, ce_C, targets.logp_NK.exp().sum(1), student_tail_C, agree_C
    )
    if not want_grad:
        return sums

    kd_scale = (1.0 - ce_weight) * T
    coefficient_C = kd_scale * grad_CB[:, -1] / all_.tempered_sum_C.clamp(min=0.5) * torch.exp(all_.gap_C / T)
    values_CK = kd_scale * grad_CB[:, :-1]
    if ce_weight > 0.0:
        values_CK = values_CK + ce_weight * torch.exp(support_CK - lse_one_C[:, None])
        ce_coefficient_C = ce_weight * torch.exp(tail_one_C - lse_one_C) / all_.one_sum_C.clamp(min=0.5)
        ce_coefficient_C = ce_coefficient_C * torch.exp(all_.gap_C)
        if T == 1.0:  # one array is both softmaxes
            coefficient_C = coefficient_C + ce_coefficient_C
    tempered_CV.mul_(coefficient_C[:, None])
    if ce_weight > 0.0 and T != 1.0:
        tempered_CV.addcmul_(one_CV, ce_coefficient_C[:, None])
    tempered_CV.scatter_add_(1, index_CK, values_CK.masked_fill(~mine_CK, 0.0))
    if ce_weight > 0.0:
        label_C1 = place_CJ[:, -2:-1]
        tempered_CV.scatter_add_(1, label_C1, here_CJ[:, -2:-1].to(z_CV.dtype) * -ce_weight)
    if slope_CV is not None:
        tempered_CV.addcmul_(tempered_CV, slope_CV, value=-1.0)
    return sums
