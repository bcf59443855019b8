"""linear_topk_lse: the teacher's K largest logits and log-sum-exp from its hidden states, without N×V logits.

Legend: N rows, C rows of one chunk, R rows in doubt, H hidden size, V vocabulary, K entries kept, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.fused.autograd import runs_eagerly
from kdscale_kernels.fused.bf16_topk import BF16_CHUNK_BYTES, bf16_candidates_fit, bf16_topk_lse
from kdscale_kernels.fused.products import (
    HeadProducts,
    bf16_logits_are_fast,
    chunk_bytes_for,
    compute_dtypes,
    row_chunks,
)
from kdscale_kernels.ops import arguments
from kdscale_kernels.row_steps import RowSteps, row_steps
from kdscale_kernels.triton_kernels.limits import topk_limit
from kdscale_kernels.types import Backend, LossOptions, TopKLse, integer


@runs_eagerly
@torch.no_grad()
def linear_topk_lse(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    backend: Backend = "auto",
) -> TopKLse:
    """Top-k and log-sum-exp of softcap(hidden · weightᵀ + bias), fp32, within chunk_bytes of logits at once.

    hidden_NH [N,H] and weight_VH [V,H] in fp32, bf16, fp16 or fp64 (which is then computed in fp64). Returns ids [N,k]
    (descending by logit, lower id first among equals), logits [N,k] and lse [N] = logsumexp(z / temperature), from
    hidden states [B,S,H] as [B,S,k] and [B,S]. With k >= V all V entries come back. vocab_size keeps the first
    entries only, for a padded head. chunk_bytes None: 64 MiB on a CPU, 1 GiB on CUDA. No gradients. A NaN
    logit makes its row's lse NaN. Raises ValueError for arguments that do not fit together.
    """
    options = LossOptions(temperature=temperature, softcap=softcap)
    shape, hidden_NH = arguments.as_rows(hidden_NH=hidden_NH)
    arguments.check_linear(hidden_NH, weight_VH, bias_V)
    vocab = arguments.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    k = min(integer("k", k, 1), vocab)
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    device = hidden_NH.device
    plain_head = bias_V is None and softcap is None
    bf16_logits = plain_head and bf16_logits_are_fast(device, operand) and bf16_candidates_fit(vocab, k)
    many = len(hidden_NH) * vocab if bf16_logits else 0
    steps = row_steps(choose_backend(backend, device, limit=topk_limit(vocab, k, accumulate), bf16_logits=many))
    budget = chunk_bytes_for(chunk_bytes, device)
    with torch.autocast(device.type, enabled=False):
        head = HeadProducts(weight_VH, bias_V, operand, accumulate, vocab)
        run = _from_bf16_logits if bf16_logits and steps.bf16_steps is not None else _from_fp32_logits
        return arguments.in_shape(run(hidden_NH, head, k, options, budget, steps), shape)


def _from_fp32_logits(
    hidden_NH: Tensor, head: HeadProducts, k: int, options: LossOptions, budget: int, steps: RowSteps
) -> TopKLse:
    """From logits with fp32 (or fp64) results."""
    result = _empty(hidden_NH, k, head.accumulate)
    vocab, buffers = head.given_VH.shape[0], steps.topk_buffers(options)
    chunks = row_chunks(len(hidden_NH), vocab, budget, buffers=buffers, item_bytes=head.accumulate.itemsize)
    buffer = hidden_NH.new_empty(chunks[0].stop if chunks else 0, vocab, dtype=head.accumulate)
    for chunk in chunks:
        z_CV = head.logits(head.cast(hidden_NH[chunk]), buffer[: chunk.stop - chunk.start])
        for field, value in zip(result, steps.topk(z_CV, k, options), strict=True):
            field[chunk] = value
    return result


def _from_bf16_logits(
    hidden_NH: Tensor, head: HeadProducts, k: int, options: LossOptions, budget: int, steps: RowSteps
) -> TopKLse:
    """From bf16 logits (fused/bf16_topk.py); from fp32 ones for rows in which those leave a doubt."""
    assert steps.bf16_steps is not None
    result = _empty(hidden_NH, k, head.accumulate)
    weight_VH, doubtful = head.given_VH.to(head.operand), hidden_NH.new_empty(len(hidden_NH), dtype=torch.bool)
    chunks = row_chunks(len(hidden_NH), len(weight_VH), min(budget, BF16_CHUNK_BYTES), item_bytes=head.operand.itemsize)
    buffer = hidden_NH.new_empty(chunks[0].stop if chunks else 0, len(weight_VH), dtype=head.operand)
    for chunk in chunks:
        hidden_CH = hidden_NH[chunk].to(head.operand)
        top, doubtful[chunk] = bf16_topk_lse(
            hidden_CH, weight_VH, k, options.temperature, buffer[: chunk.stop - chunk.start], steps.bf16_steps
        )
        for field, value in zip(result, top, strict=True):
            field[chunk] = value
    rows_R = doubtful.nonzero()[:, 0]
    if rows_R.numel():
        top = _from_fp32_logits(hidden_NH[rows_R], head, k, options, budget, steps)
        for field, value in zip(result, top, strict=True):
            field[rows_R] = value
    return result


def _empty(hidden_NH: Tensor, k: int, dtype: torch.dtype) -> TopKLse:
    rows = len(hidden_NH)
    return TopKLse(
        hidden_NH.new_empty(rows, k, dtype=torch.int64),
        hidden_NH.new_empty(rows, k, dtype=dtype),
        hidden_NH.new_empty(rows, dtype=dtype),
    )
