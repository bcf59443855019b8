"""The row step that all sparse losses share: logits in, loss out, and the logits overwritten by their gradient.

Legend: C rows of one chunk, V vocabulary, K teacher entries, B = K + 1 buckets, T temperature.

All these losses see the vocabulary as K entries and one tail, so dz is known once the tail is:
dz_j = c·r_j for j in the tail, where r is the softmax within the tail and c one number per row, plus K values written
over the entries and -ce_weight at the label. Working with r keeps the tail's mass out of every denominator: the mass
is a sum over the masked row, never one minus something, and stays meaningful when it underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.rows.divergences import divergence
from kdscale_kernels.rows.results import RowSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


def sparse_step(
    z_CV: Tensor,
    entries: TeacherEntries,
    labels_C: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
    rows_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RowSteps.sparse for fp32 or fp64 logits, contiguous; dz is in their dtype."""
    assert rows_C is None, "torch has no in_place_dtypes"
    T, ce_weight = options.temperature, entries.ce_weight(options)
    slope_CV = cap_(z_CV, options.softcap) if options.softcap is not None else None
    support_CK = z_CV.gather(1, entries.ids_NK).masked_fill(~entries.used_NK, _NEG_INF)
    label_C = z_CV.gather(1, labels_C[:, None])[:, 0]
    top1_C = z_CV.gather(1, entries.top1_N[:, None])[:, 0]

    z_CV.scatter_(1, entries.ids_NK, _NEG_INF)
    top_C = z_CV.amax(1)  # of the tail only: the shift must be the tail's own, or a small tail underflows
    agree_C = (top1_C >= torch.maximum(top_C, support_CK.amax(1))).to(z_CV.dtype)
    z_CV.sub_(top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None])
    plain_CV = torch.exp(z_CV) if T != 1.0 else z_CV.exp_()
    plain_sum_C = plain_CV.sum(1)
    tempered_CV = z_CV.div_(T).exp_() if T != 1.0 else plain_CV
    tempered_sum_C = tempered_CV.sum(1) if T != 1.0 else plain_sum_C

    plain_lse_C = torch.logaddexp(torch.logsumexp(support_CK, 1), top_C + plain_sum_C.log())
    ce_C = plain_lse_C - label_C
    tail_C = top_C / T + tempered_sum_C.log()
    kd_C, grad_CB, student_tail_C = bucket_step(support_CK / T, tail_C, entries, options)
    loss_C = mix(ce_weight, ce_C, T * T * kd_C)
    sums = RowSums(loss_C, kd_C, ce_C, entries.logp_NK.exp().sum(1), student_tail_C, agree_C)
    if not want_grad:
        return torch.stack(sums), z_CV

    # An empty tail has sum 0 and only zeros to scale; anything else has sum >= 1 by the choice of shift.
    kd_scale = (1.0 - ce_weight) * T
    coefficient_C = kd_scale * grad_CB[:, -1] / tempered_sum_C.clamp(min=0.5)
    values_CK = column(kd_scale) * grad_CB[:, :-1]
    if options.ce_weight > 0.0:
        ce_coefficient_C = ce_weight * torch.exp(top_C + plain_sum_C.log() - plain_lse_C) / plain_sum_C.clamp(min=0.5)
        values_CK = values_CK + column(ce_weight) * torch.exp(support_CK - plain_lse_C[:, None])
        if T == 1.0:
            coefficient_C = coefficient_C + ce_coefficient_C
    tempered_CV.mul_(coefficient_C[:, None])
    if options.ce_weight > 0.0 and T != 1.0:
        tempered_CV.addcmul_(plain_CV, ce_coefficient_C[:, None])
    values_CK = torch.where(entries.used_NK, values_CK, values_CK[:, :1])  # unused slots repeat the first entry
    tempered_CV.scatter_(1, entries.ids_NK, values_CK)
    if options.ce_weight > 0.0:
        tempered_CV.scatter_add_(1, labels_C[:, None], (torch.zeros_like(label_C) - ce_weight)[:, None])
    if slope_CV is not None:
        tempered_CV.addcmul_(tempered_CV, slope_CV, value=-1.0)
    return torch.stack(sums), z_CV


def cap_(z_CV: Tensor, softcap: float) -> Tensor:
    """z <- softcap·tanh(z / softcap) in place; returns tanh², of which the slope is 1 - tanh²."""
    z_CV.div_(softcap).tanh_()
    square_CV = z_CV * z_CV
    z_CV.mul_(softcap)
    return square_CV


def bucket_step(
    support_CK: Tensor, tail_C: Tensor, entries: TeacherEntries, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(D [C], gradient by the tempered logit of each bucket [C,B], the student's tail mass [C]).

    support_CK: the student's tempered logits at the entries; tail_C: the log-sum-exp of its tempered tail.
    """
    support_lse_C = torch.logsumexp(support_CK, 1)
    lse_C = torch.logaddexp(support_lse_C, tail_C)
    student_tail_C = torch.exp(tail_C - lse_C)
    logp_CK, logp_tail_C = entries.logp_NK, entries.logp_tail_N
    logq_tail_C = tail_C - lse_C
    if options.tail == "renormalised":
        logp_CK = logp_CK - torch.logsumexp(logp_CK, 1, keepdim=True)
        lse_C = support_lse_C + 0.0 * torch.where(tail_C == _NEG_INF, 0.0, tail_C)  # a NaN in the tail still poisons
        logp_tail_C, logq_tail_C = torch.full_like(tail_C, _NEG_INF), torch.full_like(tail_C, _NEG_INF)
    count_tail_C = ~entries.covers_vocab_N if options.tail == "bucket" else torch.zeros_like(entries.covers_vocab_N)
    logp_CB = torch.cat([logp_CK, logp_tail_C[:, None]], 1)
    logq_CB = torch.cat([support_CK - lse_C[:, None], logq_tail_C[:, None]], 1)
    counted_CB = torch.cat([entries.used_NK, count_tail_C[:, None]], 1)
    kd_C, grad_CB = divergence(logp_CB, logq_CB, counted_CB, options)
    return kd_C, grad_CB, student_tail_C


def column(value: float | Tensor) -> float | Tensor:
    """A number, or one a row as [C, 1]."""
    return value[:, None] if isinstance(value, Tensor) else value


def mix(ce_weight: float | Tensor, ce_C: Tensor, kd_C: Tensor) -> Tensor:
    """ce_weight·CE + (1 - ce_weight)·KD without letting a zero weight turn an infinite part into NaN."""
    if isinstance(ce_weight, Tensor):
        mixed_C = ce_weight * ce_C + (1.0 - ce_weight) * kd_C
        return torch.where(ce_weight == 0.0, kd_C, torch.where(ce_weight == 1.0, ce_C, mixed_C))
    if ce_weight == 0.0:
        return kd_C
    if ce_weight == 1.0:
        return ce_C
    return ce_weight * ce_C + (1.0 - ce_weight) * kd_C
