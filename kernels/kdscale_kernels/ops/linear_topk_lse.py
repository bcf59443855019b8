"""linear_topk_lse: the teacher's K largest logits and log-sum-exp from its hidden states, without N×V logits.

Legend: N rows, C rows of one chunk, R rows in doubt, H hidden size, V vocabulary, K entries kept, T temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.backend import choose_backend
from kdscale_kernels.fused.bf16_topk import NARROW_BYTES, narrow_fits, narrow_topk_lse
from kdscale_kernels.fused.products import Head, chunk_bytes_for, compute_dtypes, logits_may_be_narrow, row_chunks
from kdscale_kernels.ops import arguments
from kdscale_kernels.rows.limits import topk_limit
from kdscale_kernels.rows.torch_sparse import cap_
from kdscale_kernels.rows.torch_topk import topk_rows
from kdscale_kernels.types import Backend, LossOptions, TopKLse


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
    (descending by logit, lower id first among equals), logits [N,k] and lse [N] = logsumexp(z / temperature). With
    k >= V all V entries come back. vocab_size keeps the first entries only, for a padded head. chunk_bytes None: 64 MiB
    on a CPU, 1 GiB on CUDA. No gradients.
    A NaN logit makes its row's lse NaN. Raises ValueError for arguments that do not fit together.
    """
    arguments.check_linear(hidden_NH, weight_VH, bias_V)
    options = LossOptions(temperature=temperature, softcap=softcap)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    vocab = arguments.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    k = min(k, vocab)
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    device = hidden_NH.device
    chosen = choose_backend(backend, device, cannot=topk_limit(vocab, k, accumulate))
    budget = chunk_bytes_for(chunk_bytes, device)
    with torch.autocast(device.type, enabled=False):
        head = Head(weight_VH, bias_V, operand, accumulate, vocab)
        plain = bias_V is None and softcap is None
        if chosen == "torch" and plain and logits_may_be_narrow(device, operand) and narrow_fits(vocab, k):
            return _narrow(hidden_NH, head, k, options, budget)
        return _wide(hidden_NH, head, k, options, budget, chosen)


def _wide(hidden_NH: Tensor, head: Head, k: int, options: LossOptions, budget: int, chosen: str) -> TopKLse:
    """From logits with fp32 (or fp64) results."""
    result = _empty(hidden_NH, k, head.accumulate)
    vocab, buffers = head.given_VH.shape[0], 1 + (options.softcap is not None and chosen == "torch")
    chunks = row_chunks(len(hidden_NH), vocab, budget, buffers=buffers, item_bytes=head.accumulate.itemsize)
    buffer = hidden_NH.new_empty(chunks[0].stop if chunks else 0, vocab, dtype=head.accumulate)
    for chunk in chunks:
        z_CV = head.logits(head.cast(hidden_NH[chunk]), buffer[: chunk.stop - chunk.start])
        found = topk_lse_step(z_CV, k, options, chosen)
        for part, made in zip(result, found, strict=True):
            part[chunk] = made
    return result


def topk_lse_step(z_CV: Tensor, k: int, options: LossOptions, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [C,k], logits [C,k], logsumexp(z / T) [C]) of raw logits, which are destroyed; ties as in topk_rows.

    A row of -inf alone has a log-sum-exp of -inf.
    """
    if backend == "triton":
        from kdscale_kernels.triton_kernels.topk import topk_lse_rows

        return topk_lse_rows(z_CV, k, options.temperature, options.softcap)
    if options.softcap is not None:
        cap_(z_CV, options.softcap)
    ids_CK, values_CK = topk_rows(z_CV, k)
    top_C = values_CK[:, 0]
    shift_C = top_C.masked_fill(top_C == float("-inf"), 0.0)  # a shard's row may be nothing but -inf
    z_CV.sub_(shift_C[:, None]).div_(options.temperature).exp_()
    return ids_CK, values_CK, top_C / options.temperature + z_CV.sum(1).log()


def _narrow(hidden_NH: Tensor, head: Head, k: int, options: LossOptions, budget: int) -> TopKLse:
    """From bf16 logits (narrow_topk.py); rows in which those leave a doubt from fp32 ones."""
    result = _empty(hidden_NH, k, head.accumulate)
    weight_VH, doubtful = head.given_VH.to(head.operand), hidden_NH.new_empty(len(hidden_NH), dtype=torch.bool)
    chunks = row_chunks(len(hidden_NH), len(weight_VH), min(budget, NARROW_BYTES), item_bytes=head.operand.itemsize)
    buffer = hidden_NH.new_empty(chunks[0].stop if chunks else 0, len(weight_VH), dtype=head.operand)
    for chunk in chunks:
        hidden_CH = hidden_NH[chunk].to(head.operand)
        found, doubtful[chunk] = narrow_topk_lse(
            hidden_CH, weight_VH, k, options.temperature, buffer[: chunk.stop - chunk.start]
        )
        for part, made in zip(result, found, strict=True):
            part[chunk] = made
    rows_R = doubtful.nonzero()[:, 0]
    if rows_R.numel():
        for part, made in zip(result, _wide(hidden_NH[rows_R], head, k, options, budget, "torch"), strict=True):
            part[rows_R] = made
    return result


def _empty(hidden_NH: Tensor, k: int, dtype: torch.dtype) -> TopKLse:
    rows = len(hidden_NH)
    return TopKLse(
        hidden_NH.new_empty(rows, k, dtype=torch.int64),
        hidden_NH.new_empty(rows, k, dtype=dtype),
        hidden_NH.new_empty(rows, dtype=dtype),
    )
