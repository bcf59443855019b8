"""Plain torch twins of the ops: all logits at once, autograd, any dtype. The ops are tested against them.

Legend: N rows, V vocabulary, K teacher entries, T temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdscale_kernels.divergence import Divergence
from kdscale_kernels.rows.divergences import TORCH_DIVERGENCES
from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR
from kdscale_kernels.types import IGNORE_INDEX, FullKL, SparseKL, Tail, TopKLse

_NEG_INF = float("-inf")


def head_logits(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """softcap·tanh((hidden · weightᵀ + bias) / softcap), the first vocab_size columns."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)[:, :vocab_size]
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def linear_topk_lse(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TopKLse:
    """Twin of kdscale_kernels.linear_topk_lse."""
    logits_NV = head_logits(hidden_NH, weight_VH, bias_V, softcap, vocab_size)
    values_NV, ids_NV = torch.sort(logits_NV, dim=1, descending=True, stable=True)
    return TopKLse(ids_NV[:, :k], values_NV[:, :k], torch.logsumexp(logits_NV / temperature, 1))


def linear_sparse_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    **options: Any,
) -> SparseKL:
    """Twin of kdscale_kernels.linear_sparse_kl; options as sparse_kl takes them."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    return sparse_kl(logits_NV, ids_NK, teacher_logits_NK, teacher_lse_N, **options)


def sparse_kl(
    logits_NV: Tensor,
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int = IGNORE_INDEX,
    ce_weight: float | Tensor = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    tail: Tail = "bucket",
    target_weights_NK: Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> SparseKL:
    """Twin of kdscale_kernels.sparse_kl, a row at a time so that each row's support may have its own size."""
    logits_NV = logits_NV[:, :vocab_size]
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    rows = (labels_N != ignore_index).nonzero()[:, 0].tolist()
    zero = logits_NV.sum() * 0.0 if not rows else logits_NV.new_zeros(())
    loss, kd, ce, mass, tails, agree = zero, zero, zero, zero, zero, zero
    for row in rows:
        z_V = logits_NV[row]
        entries = {int(i): v for i, v in zip(ids_NK[row], teacher_logits_NK[row], strict=True) if v != _NEG_INF}
        ids_S = torch.tensor(sorted(entries), device=z_V.device)
        logp_S = torch.stack([entries[i] for i in sorted(entries)]).to(z_V) / temperature - teacher_lse_N[row].to(z_V)
        if target_weights_NK is not None:
            pairs = zip(ids_NK[row].tolist(), teacher_logits_NK[row], target_weights_NK[row].to(z_V), strict=True)
            weights_V = torch.zeros_like(z_V)
            for i, v, w in pairs:
                if v != _NEG_INF:
                    weights_V[i] += w
            logp_S = weights_V[ids_S].log()
        logq_V = torch.log_softmax(z_V / temperature, 0)
        outside_V = torch.ones_like(z_V, dtype=torch.bool)
        outside_V[ids_S] = False
        row_kd = _row_divergence(logp_S, logq_V[ids_S], logq_V[outside_V], Divergence.of(divergence), tail)
        row_ce = -torch.log_softmax(z_V, 0)[labels_N[row]]
        alpha = ce_weight[row].to(z_V) if isinstance(ce_weight, Tensor) else ce_weight
        loss, kd, ce = loss + row_kd * ((1.0 - alpha) * temperature**2) + row_ce * alpha, kd + row_kd, ce + row_ce
        mass = mass + logp_S.exp().sum()
        tails = tails + logq_V[outside_V].detach().exp().sum()
        agree = agree + (z_V.argmax() == max(entries, key=lambda i, e=entries: (float(e[i]), -i)))  # type: ignore[misc]
    tokens = torch.tensor(len(rows), device=logits_NV.device)
    return SparseKL(loss, tokens, kd.detach(), ce.detach(), mass, tails, agree.detach())


def _row_divergence(
    logp_S: Tensor,
    logq_S: Tensor,
    logq_outside: Tensor,
    divergence: Divergence,
    tail: Tail,
) -> Tensor:
    if tail == "renormalised":
        logp_S, logq_S = logp_S.log_softmax(0), logq_S.log_softmax(0)
    elif tail == "bucket" and logq_outside.numel():
        logp_tail = torch.log(-torch.expm1(torch.logsumexp(logp_S, 0).clamp(max=0.0)))
        if divergence.info.floors_teacher_tail:
            logp_tail = logp_tail.clamp(min=math.log(TEACHER_TAIL_FLOOR))
        logp_S = torch.cat([logp_S, logp_tail[None]])
        logq_S = torch.cat([logq_S, torch.logsumexp(logq_outside, 0)[None]])
    return TORCH_DIVERGENCES[divergence.name].definition(logp_S, logq_S, divergence.parameter)


def linear_full_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    labels_N: Tensor,
    ignore_index: int = IGNORE_INDEX,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    divergence: Divergence | str = "forward_kl",
    bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
) -> FullKL:
    """Twin of kdscale_kernels.linear_full_kl."""
    valid_N = labels_N != ignore_index
    labels_M = labels_N[valid_N].long()
    student = head_logits(hidden_NH, weight_VH, bias_V, softcap, vocab_size)[valid_N]
    teacher = head_logits(teacher_hidden_NG, teacher_weight_VG, teacher_bias_V, teacher_softcap, vocab_size)[valid_N]
    teacher = teacher.detach().to(student.dtype)
    kd = student.sum() * 0.0 if not len(student) else student.new_zeros(())
    for z_V, teacher_V in zip(student, teacher, strict=True):
        logp_V, logq_V = (torch.log_softmax(logits / temperature, 0) for logits in (teacher_V, z_V))
        kd = kd + _row_divergence(logp_V, logq_V, logq_V[:0], Divergence.of(divergence), "bucket")
    ce = torch.nn.functional.cross_entropy(student, labels_M, reduction="sum")
    teacher_ce = torch.nn.functional.cross_entropy(teacher, labels_M, reduction="sum")
    agree = (student.argmax(1) == teacher.argmax(1)).sum().to(student.dtype)
    loss = kd * ((1.0 - ce_weight) * temperature**2) + ce * ce_weight
    return FullKL(loss, valid_N.sum(), kd.detach(), ce.detach(), teacher_ce, agree)


def vocab_parallel_topk_lse(
    hidden_NH: Tensor,
    shards: Sequence[Tensor],
    k: int,
    *,
    vocab_size: int,
    bias_shards: Sequence[Tensor] | None = None,
    **options: Any,
) -> TopKLse:
    """Twin of kdscale_kernels.vocab_parallel_topk_lse: all shards in one process, in order of their first id."""
    bias_V = None if bias_shards is None else torch.cat(list(bias_shards))
    return linear_topk_lse(hidden_NH, torch.cat(list(shards)), k, bias_V=bias_V, vocab_size=vocab_size, **options)


def vocab_parallel_sparse_kl(
    hidden_NH: Tensor,
    shards: Sequence[Tensor],
    ids_NK: Tensor,
    teacher_logits_NK: Tensor,
    teacher_lse_N: Tensor,
    *,
    vocab_size: int,
    bias_shards: Sequence[Tensor] | None = None,
    **options: Any,
) -> SparseKL:
    """Twin of kdscale_kernels.vocab_parallel_sparse_kl: all shards in one process, in order of their first id."""
    bias_V = None if bias_shards is None else torch.cat(list(bias_shards))
    head_VH, targets = torch.cat(list(shards)), (ids_NK, teacher_logits_NK, teacher_lse_N)
    return linear_sparse_kl(hidden_NH, head_VH, *targets, bias_V=bias_V, vocab_size=vocab_size, **options)
