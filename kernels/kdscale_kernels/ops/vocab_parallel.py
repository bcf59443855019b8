"""vocab_parallel_topk_lse and vocab_parallel_sparse_kl: the ops for a head split over ranks by vocabulary.

Legend: N rows, M valid rows, C rows of one chunk, H hidden size, Vs rows of this rank's shard, R ranks, K teacher
entries, T temperature.

Every rank holds the same hidden states and targets, and its own rows of the head. fused/shard_rows.py says how a row's
softmax is joined from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdscale_kernels.backend import BackendUnavailableError, choose_backend
from kdscale_kernels.divergence import Divergence
from kdscale_kernels.fused.autograd import ForwardResult, runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.products import chunk_bytes_for, compute_dtypes, row_chunks
from kdscale_kernels.fused.shard_agreement import AgreedShard, ShardClaim, agree
from kdscale_kernels.fused.shard_rows import ShardGradientSums, ShardProducts, shard_rows_step
from kdscale_kernels.ops import arguments
from kdscale_kernels.row_steps import RowSteps, row_steps
from kdscale_kernels.rows.results import RowSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.triton_kernels.limits import sparse_limit, topk_limit
from kdscale_kernels.types import IGNORE_INDEX, Backend, LossOptions, SparseKL, Tail, TopKLse, integer

_NEG_INF = float("-inf")


@runs_eagerly
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
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> TopKLse:
    """linear_topk_lse for a head split over the ranks of `group` (None: the default group); the same on every rank.

    hidden_NH [N,H]: equal on all ranks. weight_VsH [Vs,H], bias_Vs [Vs]: this rank's vocabulary entries first_id to
    first_id + Vs; shards may differ in size, and rows past vocab_size (the whole vocabulary's, not the shard's) are
    padding. ids are those of the whole vocabulary. Each rank sends its k best of a chunk, and its log-sum-exp, in one
    all-gather. Logits live as [rows, Vs] chunks within chunk_bytes (None: 64 MiB on a CPU, 1 GiB on CUDA) on the rank
    with the largest shard; no gradients. Each rank picks its backend by its own shard.
    Raises ValueError on every rank for arguments that do not fit together, or where another rank's backend cannot run
    (there: BackendUnavailableError); RuntimeError without a process group.
    """
    claim: ShardClaim | ValueError | BackendUnavailableError
    steps = row_steps("torch")
    try:
        options = LossOptions(temperature=temperature, softcap=softcap)
        vocab_size = integer("vocab_size", vocab_size, 1)
        shape, hidden_NH = arguments.as_rows(hidden_NH=hidden_NH)
        arguments.check_linear(hidden_NH, weight_VsH, bias_Vs)
        k, budget = integer("k", k, 1), chunk_bytes_for(chunk_bytes, hidden_NH.device)
        operand, accumulate = compute_dtypes(hidden_NH, weight_VsH)
        settings = (options, operand, budget)
        claim = _claim(first_id, weight_VsH, vocab_size, hidden_NH.shape[0], k, False, settings)
        limit = topk_limit(claim.used, min(k, claim.used), accumulate)
        steps = row_steps(choose_backend(backend, hidden_NH.device, limit=limit))
    except (ValueError, BackendUnavailableError) as error:
        claim = error
    shard = agree(claim, getattr(hidden_NH, "device", torch.device("cpu")), group)
    k, rows = min(k, vocab_size), hidden_NH.shape[0]
    buffers = row_steps("torch").topk_buffers(options)  # Triton needs less, but all ranks must cut the rows alike
    chunks = row_chunks(rows, shard.widest, budget, buffers=buffers, item_bytes=accumulate.itemsize)
    result = TopKLse(
        torch.empty(rows, k, dtype=torch.int64, device=hidden_NH.device),
        torch.empty(rows, k, dtype=accumulate, device=hidden_NH.device),
        torch.empty(rows, dtype=accumulate, device=hidden_NH.device),
    )
    with torch.autocast(hidden_NH.device.type, enabled=False):
        head = ShardProducts(weight_VsH, bias_Vs, operand, accumulate, shard)
        buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, head.width), dtype=accumulate)
        for chunk in chunks:
            z_CV = head.logits(head.cast(hidden_NH[chunk]), buffer[: chunk.stop - chunk.start])
            for field, value in zip(result, _joined_topk(z_CV, k, shard, options, steps), strict=True):
                field[chunk] = value
    return arguments.in_shape(result, shape)


def _joined_topk(
    z_CV: Tensor, k: int, shard: AgreedShard, options: LossOptions, steps: RowSteps
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logits [C,k], lse [C]) of the whole vocabulary, from each rank's k best. z_CV is raw, and destroyed."""
    rows, own = z_CV.shape[0], min(k, shard.used)
    # fp64 holds ids and fp32 logits exactly, so one array carries all. Slots a small shard leaves open sort last.
    sent_CJ = torch.full((rows, 2 * k + 1), _NEG_INF, dtype=torch.float64, device=z_CV.device)
    sent_CJ[:, :k] = shard.vocab
    if own:
        ids_CK, sent_CJ[:, k : k + own], sent_CJ[:, -1] = steps.topk(z_CV, own, options)
        sent_CJ[:, :own] = ids_CK + shard.first_id
    all_RCJ = sent_CJ.new_empty(shard.ranks, *sent_CJ.shape)
    dist.all_gather(list(all_RCJ), sent_CJ, group=shard.group)
    ids_CJ, values_CJ = (all_RCJ[:, :, j].transpose(0, 1).flatten(1) for j in (slice(0, k), slice(k, 2 * k)))
    ids_CJ, by_id_CJ = ids_CJ.sort(dim=1, stable=True)
    values_CJ, by_value_CJ = values_CJ.gather(1, by_id_CJ).sort(dim=1, descending=True, stable=True)
    lse_C = torch.logsumexp(all_RCJ[:, :, -1], 0)
    return ids_CJ.gather(1, by_value_CJ)[:, :k].long(), values_CJ[:, :k], lse_C


@runs_eagerly
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
    ignore_index: int | None = IGNORE_INDEX,
    ce_weight: float | Tensor = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    tail: Tail = "bucket",
    target_weights_NK: Tensor | None = None,
    bias_Vs: Tensor | None = None,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> SparseKL:
    """linear_sparse_kl for a head split over the ranks of `group`: the same sums, bit for bit, on every rank.

    hidden_NH [N,H], the targets (weights too) and labels_N: equal on all ranks, ids and labels those of
    the whole vocabulary; first_id, vocab_size, weight_VsH, bias_Vs and group as in vocab_parallel_topk_lse; the rest
    as in linear_sparse_kl. Call it, and backward, on every rank of the group.

    The gradient of hidden_NH is already summed over the ranks (one all-reduce [C,H] a chunk, overlapped with the next
    chunk's products): nothing around the op may sum it again, as a tensor-parallel "copy to region" would. Those of
    weight_VsH and bias_Vs stay local. Partial sums meet in fp32 as fused/shard_rows.py describes; there is no
    shared row constant that could be too far off: a shard whose tail lies e^-200 below another's keeps its own scale.
    Gradients are made in the forward pass; one backward. Two waits for the device a call (valid rows, unless
    ignore_index is None; agreement).
    chunk_bytes None: 64 MiB of logits on a CPU, 1 GiB on CUDA.
    Raises ValueError on every rank for arguments that do not fit together, or where another rank's backend cannot run
    (there: BackendUnavailableError); RuntimeError without a process group.
    """
    claim: ShardClaim | ValueError | BackendUnavailableError
    steps = row_steps("torch")
    try:
        for_all, ce_weight_N = arguments.ce_weight_of_rows(ce_weight)
        options = LossOptions(for_all, temperature, Divergence.of(divergence), tail, softcap)
        vocab_size = integer("vocab_size", vocab_size, 1)
        _, hidden_NH, *targets, labels_N, ce_weight_N = arguments.as_rows(
            hidden_NH=hidden_NH,
            ids_NK=ids_NK,
            teacher_logits_NK=teacher_logits_NK,
            teacher_lse_N=teacher_lse_N,
            target_weights_NK=target_weights_NK,
            labels_N=labels_N,
            ce_weight_N=ce_weight_N,
        )
        arguments.check_linear(hidden_NH, weight_VsH, bias_Vs)
        arguments.check_targets(hidden_NH.shape[0], targets, labels_N, tail)
        arguments.check_ce_weights(ce_weight_N, labels_N)
        arguments.check_same_device(hidden_NH, labels_N)
        wants_grad = wants_gradients(hidden_NH, weight_VsH, bias_Vs)
        operand, accumulate = compute_dtypes(hidden_NH, weight_VsH)
        budget = chunk_bytes_for(chunk_bytes, hidden_NH.device)
        valid = arguments.valid_rows(targets, labels_N, ignore_index, vocab_size, temperature, accumulate, ce_weight_N)
        limit = sparse_limit(options.divergence, targets[0].shape[1], accumulate)
        steps = row_steps(choose_backend(backend, hidden_NH.device, limit=limit))
        settings = (options, operand, budget)
        sizes = (valid.index_M.numel(), targets[0].shape[1])
        claim = _claim(first_id, weight_VsH, vocab_size, *sizes, wants_grad[0], settings)
    except (ValueError, BackendUnavailableError) as error:
        claim = error
    shard = agree(claim, getattr(hidden_NH, "device", torch.device("cpu")), group)
    call = _ShardCall(*valid, options, shard, budget, operand, accumulate, steps, wants_grad)
    outputs = with_forward_gradients("vocab_parallel_sparse_kl", _run, hidden_NH, weight_VsH, bias_Vs, call)
    tokens = torch.full((), valid.index_M.numel(), dtype=torch.int64, device=hidden_NH.device)
    return SparseKL(outputs[0], tokens, *outputs[1:])


def _claim(
    first_id: int,
    weight_VsH: Tensor,
    vocab_size: int,
    valid: int,
    entries: int,
    grad_hidden: bool,
    settings: object,
) -> ShardClaim:
    return ShardClaim(
        integer("first_id", first_id, 0), weight_VsH.shape[0], vocab_size, valid, entries, grad_hidden, settings
    )


class _ShardCall(NamedTuple):
    """What a call of vocab_parallel_sparse_kl needs beside its differentiable inputs."""

    valid_M: Tensor
    labels_M: Tensor
    entries: TeacherEntries
    options: LossOptions
    shard: AgreedShard
    chunk_bytes: int
    operand: torch.dtype
    accumulate: torch.dtype
    steps: RowSteps
    wants_grad: tuple[bool, ...]  # gradients of hidden, weight, bias


def _run(hidden_NH: Tensor, weight_VsH: Tensor, bias_Vs: Tensor | None, call: _ShardCall) -> ForwardResult:
    head = ShardProducts(weight_VsH, bias_Vs, call.operand, call.accumulate, call.shard)
    rows, options = call.valid_M.numel(), call.options
    gradients = ShardGradientSums(hidden_NH, weight_VsH, call.wants_grad, head, rows, call.shard)
    itemsize, buffers = call.accumulate.itemsize, row_steps("torch").sparse_buffers(options)  # alike on all ranks
    chunks = row_chunks(rows, call.shard.widest, call.chunk_bytes, buffers=buffers, item_bytes=itemsize)
    buffer = hidden_NH.new_empty((chunks[0].stop if chunks else 0, head.width), dtype=call.accumulate)
    per_row = hidden_NH.new_empty((len(RowSums._fields), rows), dtype=call.accumulate)
    grad_dtype = (head.operand if head.native else call.accumulate) if any(call.wants_grad) else None
    for chunk in chunks:
        rows_C = call.valid_M[chunk]
        hidden_CH = head.cast(hidden_NH.detach()[rows_C])
        sums, dz_CV = shard_rows_step(
            head.logits(hidden_CH, buffer[: chunk.stop - chunk.start]),
            call.entries.rows(chunk),
            call.labels_M[chunk],
            options,
            call.shard,
            steps=call.steps,
            grad_dtype=grad_dtype,
        )
        per_row[:, chunk] = torch.stack(sums)
        if any(call.wants_grad):
            gradients.add(dz_CV, hidden_CH, rows_C)
    gradients.receive()
    return ForwardResult(per_row.sum(1).unbind(), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
