"""vocab_parallel_topk_lse and vocab_parallel_sparse_kl: the ops for a head split over ranks by vocabulary.

Legend: N rows, M valid rows, C rows of one chunk, H hidden size, Vs rows of this rank's shard, R ranks, K teacher
entries, T temperature.

Every rank holds the same hidden states and targets and its own rows of the head. A row's softmax needs what all ranks
hold, so each sends, in one SUM all-reduce a chunk, the student's logits at the entries it owns (zero elsewhere) and, in
a slot of its own, the maximum and the sums of exponentials of its part of the tail. Slots make the sum an exchange:
each rank shifts by its own maximum and they are joined afterwards, in rank order. So no MAX all-reduce is needed, and
no row constant shared by all ranks either, which would be too far off wherever the student's tail lies 88 nats below
or above it. It costs 3·R numbers a row, next to K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdscale_kernels import checks
from kdscale_kernels import targets as target_lists
from kdscale_kernels.dispatch import BackendUnavailableError, choose_backend
from kdscale_kernels.groups import Claim, Shard, agree
from kdscale_kernels.ops.linear_sparse_kl import refuse_double_backward, scale
from kdscale_kernels.ops.linear_topk_lse import topk_rows
from kdscale_kernels.products import Head, compute_dtypes, row_chunks
from kdscale_kernels.rows import RowSums, _bucket_step, _mix, cap_
from kdscale_kernels.types import Backend, Divergence, LossOptions, SparseKL, Tail, TopKLse

_NEG_INF = float("-inf")


@torch.no_grad()
def vocab_parallel_topk_lse(
    hidden_NH: Tensor,
    weight_VsH: Tensor,
    k: int,
    *,
    first_id: int,
    vocab_size: int,
    group: Any = None,
    temperature: float = 1.0,
    bias_Vs: Tensor | None = None,
    softcap: float | None = None,
    chunk_bytes: int = 64 << 20,
    backend: Backend = "auto",
) -> TopKLse:
    """linear_topk_lse for a head split over the ranks of `group` (None: the default group); the same on every rank.

    hidden_NH [N,H]: equal on all ranks. weight_VsH [Vs,H], bias_Vs [Vs]: this rank's vocabulary entries first_id to
    first_id + Vs; shards may differ in size, and rows past vocab_size (the whole vocabulary's, not the shard's) are
    padding. ids are those of the whole vocabulary. Each rank sends its k best of a chunk in one all-gather. Logits
    live as [rows, Vs] chunks within chunk_bytes on the rank with the largest shard; no gradients.
    Raises ValueError on every rank for arguments that do not fit together, RuntimeError without a process group.
    """
    _torch_only(backend)
    claim: Claim | ValueError
    try:
        checks.check_linear(hidden_NH, weight_VsH, bias_Vs)
        options = LossOptions(temperature=temperature, softcap=softcap)
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        operand, accumulate = compute_dtypes(hidden_NH, weight_VsH)
        settings = (options, operand, chunk_bytes)
        claim = _claim(first_id, weight_VsH, vocab_size, chunk_bytes, hidden_NH.shape[0], k, False, settings)
    except ValueError as error:
        claim = error
    shard = agree(claim, hidden_NH.device, group)
    k, rows = min(k, vocab_size), hidden_NH.shape[0]
    buffers = 1 + (softcap is not None)
    chunks = row_chunks(rows, shard.widest, chunk_bytes, buffers=buffers, item_bytes=accumulate.itemsize)
    result = TopKLse(
        torch.empty(rows, k, dtype=torch.int64, device=hidden_NH.device),
        torch.empty(rows, k, dtype=accumulate, device=hidden_NH.device),
        torch.empty(rows, dtype=accumulate, device=hidden_NH.device),
    )
    with torch.autocast(hidden_NH.device.type, enabled=False):
        head = _ShardHead(weight_VsH, bias_Vs, operand, accumulate, shard, options)
        buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, head.width), dtype=accumulate)
        for chunk in chunks:
            z_CV, _ = head.logits(head.cast(hidden_NH[chunk]), buffer[: chunk.stop - chunk.start])
            for field, value in zip(result, _joined_topk(z_CV, k, shard, temperature), strict=True):
                field[chunk] = value
    return result


def _joined_topk(z_CV: Tensor, k: int, shard: Shard, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logits [C,k], lse [C]) of the whole vocabulary, from each rank's k best. Destroys z_CV."""
    rows, mine = z_CV.shape[0], min(k, shard.used)
    # fp64 holds ids and fp32 logits exactly, so one array carries both. Slots a small shard leaves open sort last.
    sent_CJ = torch.full((rows, 2 * k + 2), _NEG_INF, dtype=torch.float64, device=z_CV.device)
    sent_CJ[:, :k] = shard.vocab
    if mine:
        ids_CK, sent_CJ[:, k : k + mine] = topk_rows(z_CV, mine)
        sent_CJ[:, :mine] = ids_CK + shard.first_id
    top_C, z_CV = _shifted(z_CV)
    sent_CJ[:, -2], sent_CJ[:, -1] = top_C, z_CV.div_(temperature).exp_().sum(1)
    all_RCJ = sent_CJ.new_empty(shard.ranks, *sent_CJ.shape)
    dist.all_gather(list(all_RCJ), sent_CJ, group=shard.group)
    ids_CJ, values_CJ = (all_RCJ[:, :, part].transpose(0, 1).flatten(1) for part in (slice(0, k), slice(k, 2 * k)))
    ids_CJ, by_id_CJ = ids_CJ.sort(dim=1, stable=True)
    values_CJ, by_value_CJ = values_CJ.gather(1, by_id_CJ).sort(dim=1, descending=True, stable=True)
    lse_C = _joined_lse(all_RCJ[:, :, -2].T, all_RCJ[:, :, -1].T, temperature)
    return ids_CJ.gather(1, by_value_CJ)[:, :k].long(), values_CJ[:, :k], lse_C


def vocab_parallel_sparse_kl(
    hidden_NH: Tensor,
    weight_VsH: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    first_id: int,
    vocab_size: int,
    group: Any = None,
    labels_N: Tensor,
    ignore_index: int = -100,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    tail: Tail = "bucket",
    target_weights_NK: Tensor | None = None,
    bias_Vs: Tensor | None = None,
    softcap: float | None = None,
    chunk_bytes: int = 64 << 20,
    backend: Backend = "auto",
) -> SparseKL:
    """linear_sparse_kl for a head split over the ranks of `group`: the same sums, bit for bit, on every rank.

    hidden_NH [N,H], the targets (weights too) and labels_N: equal on all ranks, ids and labels those of
    the whole vocabulary; first_id, vocab_size, weight_VsH, bias_Vs and group as in vocab_parallel_topk_lse; the rest
    as in linear_sparse_kl. Call it, and backward, on every rank of the group.

    The gradient of hidden_NH is already summed over the ranks (one all-reduce [C,H] a chunk, overlapped with the next
    chunk's products): nothing around the op may sum it again, as a tensor-parallel "copy to region" would. Those of
    weight_VsH and bias_Vs stay local. Partial sums meet in fp32 as described at the top of this file; there is no
    shared row constant that could be too far off: a shard whose tail lies e^-200 below another's keeps its own scale.
    Gradients are made in the forward pass; one backward. Two waits for the device a call (valid rows, agreement).
    Raises ValueError on every rank for arguments that do not fit together, RuntimeError without a process group.
    """
    _torch_only(backend)
    claim: Claim | ValueError
    grad_on = torch.is_grad_enabled()
    wanted = tuple(grad_on and t is not None and t.requires_grad for t in (hidden_NH, weight_VsH, bias_Vs))
    try:
        options = LossOptions(ce_weight, temperature, divergence, jsd_beta, tail, softcap, skew)
        checks.check_linear(hidden_NH, weight_VsH, bias_Vs)
        checks.check_targets(hidden_NH.shape[0], ids_NK, teacher_logits_NK, teacher_lse_N, labels_N)
        checks.check_weights(ids_NK, target_weights_NK, tail)
        checks.check_same_device(hidden_NH, ids_NK)
        operand, accumulate = compute_dtypes(hidden_NH, weight_VsH)
        valid_M = (labels_N != ignore_index).nonzero()[:, 0]
        labels_M, ids_MK = labels_N[valid_M].long(), ids_NK[valid_M].long()
        logits_MK, lse_M = teacher_logits_NK[valid_M].to(accumulate), teacher_lse_N[valid_M].to(accumulate)
        weights_MK = None if target_weights_NK is None else target_weights_NK[valid_M].to(accumulate)
        checks.check_target_values(ids_MK, logits_MK, lse_M, labels_M, vocab_size)
        checks.check_weight_values(weights_MK, logits_MK)
        settings = (options, operand, chunk_bytes)
        sizes = (valid_M.numel(), ids_NK.shape[1])
        claim = _claim(first_id, weight_VsH, vocab_size, chunk_bytes, *sizes, wanted[0], settings)
    except ValueError as error:
        claim = error
    shard = agree(claim, hidden_NH.device, group)
    targets = target_lists.prepare(ids_MK, logits_MK, lse_M, vocab_size, temperature, weights_MK)
    call = _Call(valid_M, labels_M, targets, options, shard, chunk_bytes, operand, accumulate, wanted)
    outputs = _VocabParallelSparseKL.apply(hidden_NH, weight_VsH, bias_Vs, call)
    tokens = torch.full((), valid_M.numel(), dtype=torch.int64, device=hidden_NH.device)
    return SparseKL(outputs[0], tokens, *outputs[1:])


def _torch_only(backend: Backend) -> None:
    if choose_backend(backend) != "torch":
        raise BackendUnavailableError("the vocab-parallel ops have no Triton form; use backend='torch' or 'auto'")


def _claim(
    first_id: int,
    weight_VsH: Tensor,
    vocab_size: int,
    chunk_bytes: int,
    valid: int,
    entries: int,
    grad_hidden: bool,
    settings: object,
) -> Claim:
    if vocab_size < 1:
        raise ValueError(f"vocab_size: expected at least 1, got {vocab_size}")
    if first_id < 0:
        raise ValueError(f"first_id: expected 0 or more, got {first_id}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected a positive number of bytes, got {chunk_bytes}")
    return Claim(first_id, weight_VsH.shape[0], vocab_size, valid, entries, grad_hidden, settings)


@dataclass(frozen=True)
class _Call:
    """Everything the op needs that has no gradient."""

    valid_M: Tensor
    labels_M: Tensor
    targets: target_lists.Targets
    options: LossOptions
    shard: Shard
    chunk_bytes: int
    operand: torch.dtype
    accumulate: torch.dtype
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias


class _ShardHead(Head):
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


def _shifted(z_CV: Tensor) -> tuple[Tensor, Tensor]:
    """(row maxima, z minus them in place; a row of -inf stays)."""
    top_C = z_CV.amax(1)
    return top_C, z_CV.sub_(top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None])


def _gaps(tops_CR: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest of the ranks' maxima [C], how far below it each lies [C,R])."""
    top_C = tops_CR.amax(1)
    return top_C, tops_CR - top_C.masked_fill(top_C == _NEG_INF, 0.0)[:, None]


def _joined_lse(tops_CR: Tensor, sums_CR: Tensor, temperature: float) -> Tensor:
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


def _rows_step(
    z_CV: Tensor, slope_CV: Tensor | None, targets: target_lists.Targets, labels_C: Tensor, call: _Call
) -> RowSums:
    """rows.rows_step with the vocabulary split: z_CV is this shard's capped logits and becomes its dloss/dz.

    Writes are additions of a value to one owner and of zero elsewhere: an id of another shard needs an index too.
    """
    options, shard = call.options, call.shard
    T, ce_weight = options.temperature, options.ce_weight
    index_CK, mine_CK = shard.local(targets.ids_NK)
    mine_CK = mine_CK & targets.used_NK
    z_of = torch.cat([targets.ids_NK, labels_C[:, None], targets.top1_N[:, None]], 1)
    place_CJ, here_CJ = shard.local(z_of)
    found_CJ = z_CV.gather(1, place_CJ).masked_fill(~here_CJ, 0.0)

    z_CV.scatter_add_(1, index_CK, torch.where(mine_CK, _NEG_INF, 0.0).to(z_CV.dtype))
    own_top_C, z_CV = _shifted(z_CV)
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
    if not any(call.wanted):
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


class _Gradients:
    """Sums of gradients over chunks. A chunk's dX is on its way round the ranks while the next chunk is computed."""

    def __init__(self, hidden_NH: Tensor, weight_VsH: Tensor, call: _Call):
        hidden, weight, bias = call.wanted
        dtype = call.accumulate
        self.hidden_NH = torch.zeros_like(hidden_NH, dtype=dtype) if hidden else None
        self.weight_VH = torch.zeros_like(weight_VsH, dtype=dtype) if weight else None
        self.bias_V = weight_VsH.new_zeros(weight_VsH.shape[0], dtype=dtype) if bias else None
        self.shard = call.shard
        self.sending: tuple[Any, Tensor, Tensor] | None = None

    def add(self, head: Head, dz_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor) -> None:
        if self.hidden_NH is not None:
            grad_CH = head.grad_hidden(dz_CV)
            self.receive()
            self.sending = (dist.all_reduce(grad_CH, group=self.shard.group, async_op=True), grad_CH, rows_C)
        used = self.shard.used
        if self.weight_VH is not None and used:
            head.add_grad_weight(dz_CV, hidden_CH, self.weight_VH[:used], first=False)
        if self.bias_V is not None and used:
            self.bias_V[:used] += dz_CV.sum(0)

    def receive(self) -> None:
        if self.sending is not None and self.hidden_NH is not None:
            work, grad_CH, rows_C = self.sending
            work.wait()
            self.hidden_NH[rows_C] = grad_CH
        self.sending = None


def _run(hidden_NH: Tensor, weight_VsH: Tensor, bias_Vs: Tensor | None, call: _Call) -> tuple[list[Tensor], _Gradients]:
    gradients = _Gradients(hidden_NH, weight_VsH, call)
    head = _ShardHead(weight_VsH, bias_Vs, call.operand, call.accumulate, call.shard, call.options)
    rows, options = call.valid_M.numel(), call.options
    itemsize = call.accumulate.itemsize
    chunks = row_chunks(rows, call.shard.widest, call.chunk_bytes, buffers=options.buffers, item_bytes=itemsize)
    buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, head.width), dtype=call.accumulate)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=call.accumulate)
    for chunk in chunks:
        rows_C = call.valid_M[chunk]
        hidden_CH = head.cast(hidden_NH.detach()[rows_C])
        z_CV, slope_CV = head.logits(hidden_CH, buffer[: chunk.stop - chunk.start])
        sums = _rows_step(z_CV, slope_CV, call.targets.rows(chunk), call.labels_M[chunk], call)
        per_row[:, chunk] = torch.stack(sums)
        if any(call.wanted):
            gradients.add(head, z_CV, hidden_CH, rows_C)
    gradients.receive()
    return list(per_row.sum(1).unbind()), gradients


class _VocabParallelSparseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VsH: Tensor, bias_Vs: Tensor | None, call: _Call
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            sums, gradients = _run(hidden_NH, weight_VsH, bias_Vs, call)
        ctx.dtypes = (hidden_NH.dtype, weight_VsH.dtype, None if bias_Vs is None else bias_Vs.dtype)
        ctx.save_for_backward(gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        ctx.mark_non_differentiable(*sums[1:])
        ctx.set_materialize_grads(False)
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("vocab_parallel_sparse_kl")
        if grad_outputs[0] is None:
            return (None,) * 4
        scaled = [scale(g, grad_outputs[0], d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None)
