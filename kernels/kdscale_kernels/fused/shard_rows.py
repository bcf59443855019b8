"""A head split over ranks by vocabulary: each rank holds one slice of every row, and the slices are put together.

Legend: C rows of one chunk, V entries of this rank's shard, R ranks, K teacher entries, T temperature.

In one SUM all-reduce per chunk each rank sends the student's logits at the entries it owns (zero elsewhere) and, in a
slot of its own, its sums over the tail. The slots make the sum an exchange: they are joined afterwards, in rank order.
So no MAX all-reduce is needed, and no row constant shared by all ranks either, which would be too far off wherever
part of the student's tail lies 88 nats from it. It costs 3·R numbers per row, beside K.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdscale_kernels.fused.products import GradientSums, HeadProducts
from kdscale_kernels.fused.shard_agreement import AgreedShard
from kdscale_kernels.row_steps import RowSteps
from kdscale_kernels.rows.results import EntryLogits, RowSums, TailSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.rows.torch_slices import join_slices
from kdscale_kernels.types import LossOptions

_NEG_INF = float("-inf")


class ShardProducts(HeadProducts):
    """The products of a shard. One that is all padding is a single row of zeros, whose logits are not counted."""

    def __init__(
        self,
        weight_VsH: Tensor,
        bias_Vs: Tensor | None,
        operand: torch.dtype,
        accumulate: torch.dtype,
        shard: AgreedShard,
    ):
        self.empty, self.width = shard.used == 0, max(shard.used, 1)
        if self.empty:
            weight_VsH, bias_Vs = weight_VsH.new_zeros(1, weight_VsH.shape[1]), None
        super().__init__(weight_VsH, bias_Vs, operand, accumulate, self.width)


class ShardGradientSums(GradientSums):
    """A chunk's dX is summed over the ranks while the next chunk is computed; dW and the bias's stay local."""

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VsH: Tensor,
        wants_grad: tuple[bool, ...],
        head: ShardProducts,
        rows: int,
        shard: AgreedShard,
    ):
        """As GradientSums. To the head of a shard that is all padding nothing is added, so that it stays zero."""
        super().__init__(hidden_NH, weight_VsH, wants_grad, head, 0 if head.empty else rows)
        self._shard = shard
        self._sending: tuple[Any, Tensor, Tensor] | None = None

    def _place_hidden(self, grad_CH: Tensor, rows_C: Tensor) -> None:
        self.receive()
        self._sending = (dist.all_reduce(grad_CH, group=self._shard.group, async_op=True), grad_CH, rows_C)

    def _add_head(self, dz_CV: Tensor, hidden_CH: Tensor) -> None:
        if self._shard.used:
            super()._add_head(dz_CV, hidden_CH)

    def receive(self) -> None:
        """Wait for the dX that is being summed, and store it."""
        if self._sending is not None:
            reduction, grad_CH, rows_C = self._sending
            reduction.wait()
            super()._place_hidden(grad_CH, rows_C)
        self._sending = None


def shard_rows_step(
    z_CV: Tensor,
    entries: TeacherEntries,
    labels_C: Tensor,
    options: LossOptions,
    shard: AgreedShard,
    *,
    steps: RowSteps,
    grad_dtype: torch.dtype | None,
) -> tuple[RowSums, Tensor]:
    """The sparse step with the vocabulary split: (the rows' sums, dz [C,V] of this shard in grad_dtype).

    z_CV: this shard's raw logits, destroyed. Without a grad_dtype there is no gradient.
    """
    empty = shard.used == 0
    first = shard.vocab if empty else shard.first_id  # the one row of an empty shard is no entry of any teacher
    slices = steps.slices(entries, labels_C, options, [first, first + z_CV.shape[1]])
    entry_logits = EntryLogits.empty(entries, labels_C, shard.vocab, z_CV.dtype)
    keep = [torch.empty_like(z_CV, dtype=grad_dtype) for _ in range(options.exponentials)] if grad_dtype else []
    tail, kept = slices.read(z_CV, 0, entry_logits, keep)
    if empty:
        tail = TailSums(torch.full_like(tail.top_C, _NEG_INF), *(torch.zeros_like(field) for field in tail[1:]))
    entry_logits, tail = _exchange(entry_logits, tail, shard)
    sums, gradient = join_slices(entry_logits, tail, entries, labels_C, options)
    if kept is None:
        return sums, z_CV
    dz_CV = slices.write_kept(kept, 0, gradient)
    return sums, dz_CV.zero_() if empty else dz_CV


def _exchange(entry_logits: EntryLogits, tail: TailSums, shard: AgreedShard) -> tuple[EntryLogits, TailSums]:
    """The same on all ranks: the entries' logits from every shard, and the tail sums of all shards, each [C, R]."""
    rows, k = entry_logits.support_CK.shape
    slots_CR3 = entry_logits.support_CK.new_zeros(rows, shard.ranks, 3)
    slots_CR3[:, shard.rank] = torch.stack(tail, 1)
    label_C1, top1_C1 = entry_logits.label_C[:, None], entry_logits.top1_C[:, None]
    sent_CJ = torch.cat([entry_logits.support_CK, label_C1, top1_C1, slots_CR3.flatten(1)], 1)
    dist.all_reduce(sent_CJ, group=shard.group)
    slots_CR3 = sent_CJ[:, k + 2 :].unflatten(1, (shard.ranks, 3))
    return EntryLogits(sent_CJ[:, :k], sent_CJ[:, k], sent_CJ[:, k + 1]), TailSums(*slots_CR3.unbind(2))
