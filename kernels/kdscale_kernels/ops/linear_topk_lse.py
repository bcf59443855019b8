"""linear_topk_lse: the teacher's K largest logits and log-sum-exp from its hidden states, without N×V logits.

Legend: N rows, C rows of one chunk, H hidden size, V vocabulary, K entries kept, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels import checks
from kdscale_kernels.dispatch import choose_backend
from kdscale_kernels.limits import GROUP, topk_limit
from kdscale_kernels.products import Head, chunk_bytes_for, compute_dtypes, row_chunks
from kdscale_kernels.rows import cap_
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
    checks.check_linear(hidden_NH, weight_VH, bias_V)
    options = LossOptions(temperature=temperature, softcap=softcap)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    vocab = checks.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    k = min(k, vocab)
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    rows, device = hidden_NH.shape[0], hidden_NH.device
    chosen = choose_backend(backend, device, cannot=topk_limit(vocab, k, accumulate))
    chunks = row_chunks(
        rows,
        vocab,
        chunk_bytes_for(chunk_bytes, device),
        buffers=1 + (softcap is not None and chosen == "torch"),
        item_bytes=accumulate.itemsize,
    )
    result = TopKLse(
        torch.empty(rows, k, dtype=torch.int64, device=device),
        torch.empty(rows, k, dtype=accumulate, device=device),
        torch.empty(rows, dtype=accumulate, device=device),
    )
    with torch.autocast(device.type, enabled=False):
        head = Head(weight_VH, bias_V, operand, accumulate, vocab)
        buffer = torch.empty(chunks[0].stop if chunks else 0, vocab, dtype=accumulate, device=device)
        for chunk in chunks:
            z_CV = head.logits(head.cast(hidden_NH[chunk]), buffer[: chunk.stop - chunk.start])
            found = topk_lse_step(z_CV, k, options, chosen)
            result.ids_NK[chunk], result.logits_NK[chunk], result.lse_N[chunk] = found
    return result


def topk_lse_step(z_CV: Tensor, k: int, options: LossOptions, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [C,k], logits [C,k], logsumexp(z / T) [C]) of raw logits, which are destroyed; ties as in topk_rows.

    A row of -inf alone has a log-sum-exp of -inf.
    """
    if backend == "triton":
        from kdscale_kernels.triton_topk import topk_lse_rows

        return topk_lse_rows(z_CV, k, options.temperature, options.softcap)
    if options.softcap is not None:
        cap_(z_CV, options.softcap)
    ids_CK, values_CK = topk_rows(z_CV, k)
    top_C = values_CK[:, 0]
    shift_C = top_C.masked_fill(top_C == float("-inf"), 0.0)  # a shard's row may be nothing but -inf
    z_CV.sub_(shift_C[:, None]).div_(options.temperature).exp_()
    return ids_CK, values_CK, top_C / options.temperature + z_CV.sum(1).log()


def topk_rows(z_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) [C,k] of the k largest a row; equal values come in order of id, NaN first.

    One entry more than asked for is searched: only where it equals the last one kept can the library's choice among
    equals matter, and those rows are sorted in full.
    """
    if k == z_CV.shape[1]:
        values_CK, ids_CK = torch.sort(z_CV, dim=1, descending=True, stable=True)
        return ids_CK, values_CK
    ids_CM = _largest(z_CV, k + 1)
    last_C, next_C = z_CV.gather(1, ids_CM[:, k - 1 :]).unbind(1)
    ids_CK = ids_CM[:, :k].sort(1).values
    values_CK, order_CK = torch.sort(z_CV.gather(1, ids_CK), dim=1, descending=True, stable=True)
    ids_CK = ids_CK.gather(1, order_CK)
    tied = ((last_C == next_C) | next_C.isnan()).nonzero()[:, 0]
    if tied.numel():
        values_TV, ids_TV = torch.sort(z_CV[tied], dim=1, descending=True, stable=True)
        ids_CK[tied], values_CK[tied] = ids_TV[:, :k], values_TV[:, :k]
    return ids_CK, values_CK


def _largest(z_CV: Tensor, count: int) -> Tensor:
    """Ids [C,count] of the largest values, descending, ties as they come.

    The `count` groups with the largest maxima hold them: a value outside has `count` that are no smaller, one in
    each. So only count·GROUP candidates (and the columns left over) are searched.
    """
    rows, vocab = z_CV.shape
    groups = vocab // GROUP
    if groups <= 2 * count:
        return z_CV.topk(count, dim=1).indices
    maxima_CG = z_CV[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2)
    group_CM = maxima_CG.topk(count, dim=1, sorted=False).indices
    within_G = torch.arange(GROUP, device=z_CV.device)
    candidates_CJ = (group_CM[:, :, None] * GROUP + within_G).flatten(1)
    if groups * GROUP < vocab:
        left_over = torch.arange(groups * GROUP, vocab, device=z_CV.device)
        candidates_CJ = torch.cat([candidates_CJ, left_over.expand(rows, -1)], 1)
    best_CM = z_CV.gather(1, candidates_CJ).topk(count, dim=1).indices
    return candidates_CJ.gather(1, best_CM)
