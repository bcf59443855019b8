"""linear_topk_lse: the teacher's K largest logits and log-sum-exp from its hidden states, without N×V logits.

Legend: N rows, C rows of one chunk, H hidden size, V vocabulary, K entries kept, G columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels import checks
from kdscale_kernels.dispatch import choose_backend
from kdscale_kernels.products import Head, compute_dtypes, row_chunks
from kdscale_kernels.rows import cap_
from kdscale_kernels.types import Backend, LossOptions, TopKLse

# Columns a group: V/G group maxima and K·G candidates are searched instead of V logits. Both stay small for V from
# 32k to 256k and K from 32 to 128; measured best of 16, 32, 64 at V=49152, K=64.
GROUP = 32


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
    chunk_bytes: int = 64 << 20,
    backend: Backend = "auto",
) -> TopKLse:
    """Top-k and log-sum-exp of softcap(hidden · weightᵀ + bias), fp32, never more than chunk_bytes of logits at once.

    hidden_NH [N,H] and weight_VH [V,H] in fp32, bf16, fp16 or fp64 (which is then computed in fp64). Returns ids [N,k]
    (descending by logit, lower id first among equals), logits [N,k] and lse [N] = logsumexp(z / temperature). With
    k >= V all V entries come back. vocab_size keeps the first entries only, for a padded head. No gradients.
    A NaN logit makes its row's lse NaN. Raises ValueError for arguments that do not fit together.
    """
    choose_backend(backend)
    checks.check_linear(hidden_NH, weight_VH, bias_V)
    options = LossOptions(temperature=temperature, softcap=softcap)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    vocab = checks.resolve_vocab(vocab_size, weight_VH.shape[0], "weight")
    k = min(k, vocab)
    operand, accumulate = compute_dtypes(hidden_NH, weight_VH)
    rows, device = hidden_NH.shape[0], hidden_NH.device
    chunks = row_chunks(rows, vocab, chunk_bytes, buffers=1 + (softcap is not None), item_bytes=accumulate.itemsize)
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
            if softcap is not None:
                cap_(z_CV, softcap)
            result.ids_NK[chunk], result.logits_NK[chunk] = topk_rows(z_CV, k)
            top_C = result.logits_NK[chunk, 0]
            z_CV.sub_(top_C[:, None]).div_(options.temperature).exp_()
            result.lse_N[chunk] = top_C / options.temperature + z_CV.sum(1).log()
    return result


def topk_rows(z_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) [C,k] of the k largest a row; equal values come in order of id, NaN first.

    The k groups with the largest maxima hold the k largest values: a value outside them has k larger ones, one in
    each. So only k·GROUP candidates (and the columns left over) are searched.
    """
    rows, vocab = z_CV.shape
    if z_CV.dtype != torch.float32:
        values_CV, ids_CV = torch.sort(z_CV, dim=1, descending=True, stable=True)
        return ids_CV[:, :k], values_CV[:, :k]
    groups = vocab // GROUP
    if groups <= k:
        keys_CV = _keys(z_CV, torch.arange(vocab, device=z_CV.device).expand(rows, vocab))
        ids_CK = _ids(keys_CV.topk(k, dim=1).values)
        return ids_CK, z_CV.gather(1, ids_CK)
    maxima_CG = z_CV[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2)
    numbers_G = torch.arange(groups, device=z_CV.device)
    group_CK = _ids(_keys(maxima_CG, numbers_G.expand(rows, groups)).topk(k, dim=1, sorted=False).values)
    within_G = torch.arange(GROUP, device=z_CV.device)
    candidates_CM = (group_CK[:, :, None] * GROUP + within_G).flatten(1)
    if groups * GROUP < vocab:
        left_over = torch.arange(groups * GROUP, vocab, device=z_CV.device)
        candidates_CM = torch.cat([candidates_CM, left_over.expand(rows, -1)], 1)
    keys_CM = _keys(z_CV.gather(1, candidates_CM), candidates_CM)
    ids_CK = _ids(keys_CM.topk(k, dim=1).values)
    return ids_CK, z_CV.gather(1, ids_CK)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order as (value, then lower id), all different, so that any top-k of them is deterministic.

    The bits of an fp32 number order as a sign-magnitude integer; flipping the lower 31 of the negative ones makes them
    order as int32. Adding zero turns -0 into 0; NaNs become one NaN, above infinity.
    """
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) + (0x7FFFFFFF - ids)


def _ids(keys: Tensor) -> Tensor:
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF)
