"""A head split over ranks by vocabulary: each rank holds one slice of every row (slices.py), and they are put together.

Legend: C rows of one chunk, V entries of this rank's shard, R ranks, K teacher entries, T temperature.

In one SUM all-reduce a chunk each rank sends the student's logits at the entries it owns (zero elsewhere) and, in a
slot of its own, its part of the tail. Slots make the sum an exchange: the parts are joined afterwards, in rank order.
So no MAX all-reduce is needed, and no row constant shared by all ranks either, which would be too far off wherever
part of the student's tail lies 88 nats from it. It costs 3·R numbers a row, next to K.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kdscale_kernels.fused.products import Head
from kdscale_kernels.fused.shard_agreement import Shard
from kdscale_kernels.row_steps import SliceSteps
from kdscale_kernels.rows.results import Found, Parts, RowSums
from kdscale_kernels.rows.teacher_entries import Targets
from kdscale_kernels.rows.torch_slices import join
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


class ShardHead(Head):
    """A shard's products. One that is all padding is a single row of zeros, whose logits count for nothing."""

    def __init__(
        self,
        weight_VsH: Tensor,
        bias_Vs: Tensor | None,
        operand: torch.dtype,
        accumulate: torch.dtype,
        shard: Shard,
    ):
        self.empty, self.width = shard.used == 0, max(shard.used, 1)
        if self.empty:
            weight_VsH, bias_Vs = weight_VsH.new_zeros(1, weight_VsH.shape[1]), None
        super().__init__(weight_VsH, bias_Vs, operand, accumulate, self.width)


def shard_rows_step(
    z_CV: Tensor,
    targets: Targets,
    labels_C: Tensor,
    options: LossOptions,
    shard: Shard,
    *,
    backend: str,
    grad_dtype: torch.dtype | None,
) -> tuple[RowSums, Tensor]:
    """rows.rows_step with the vocabulary split: (the rows' sums, dz of this shard in grad_dtype; None: no gradient).

    z_CV is this shard's raw logits and is destroyed.
    """
    empty = shard.used == 0
    first = shard.vocab if empty else shard.first_id  # an empty shard's one row is nobody's entry
    steps = SliceSteps(backend, targets, labels_C, options, [first, first + z_CV.shape[1]])
    found = Found.empty(targets, labels_C, shard.vocab, z_CV.dtype)
    keep = [torch.empty_like(z_CV, dtype=grad_dtype) for _ in range(options.exponentials)] if grad_dtype else []
    parts, kept = steps.read(z_CV, 0, found, keep)
    if empty:
        parts = Parts(torch.full_like(parts.top_C, _NEG_INF), *(torch.zeros_like(part) for part in parts[1:]))
    found, parts = _exchange(found, parts, shard)
    sums, gradient = join(found, parts, targets, labels_C, options)
    if kept is None:
        return sums, z_CV
    dz_CV = steps.write_kept(kept, 0, gradient)
    return sums, dz_CV.zero_() if empty else dz_CV


def _exchange(found: Found, parts: Parts, shard: Shard) -> tuple[Found, Parts]:
    """The same on all ranks: what all of them found, and the parts of all of them, each [C, R]."""
    rows, entries = found.support_CK.shape
    slots_CR3 = found.support_CK.new_zeros(rows, shard.ranks, 3)
    slots_CR3[:, shard.rank] = torch.stack(parts, 1)
    sent_CP = torch.cat([found.support_CK, found.label_C[:, None], found.top1_C[:, None], slots_CR3.flatten(1)], 1)
    dist.all_reduce(sent_CP, group=shard.group)
    slots_CR3 = sent_CP[:, entries + 2 :].unflatten(1, (shard.ranks, 3))
    return Found(sent_CP[:, :entries], sent_CP[:, entries], sent_CP[:, entries + 1]), Parts(*slots_CR3.unbind(2))
