"""The distillation loss from final hidden states: a thin layer over `kdscale_kernels`.

N rows (valid positions), H and G student's and teacher's hidden size, V vocabulary, K teacher's top entries.

loss = α·CE + (1−α)·T²·D(teacher ‖ student), with D on the teacher's top K entries and one tail bucket, or on the whole
vocabulary. Everything here is a SUM over rows; dividing by the tokens of the global batch happens once, in
distill/step.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from kdscale.config.objectives import LossConfig
from kdscale.models.head import OutputHead, VocabShard
from kdscale_kernels import Divergence, linear_full_kl, linear_sparse_kl, vocab_parallel_sparse_kl

# What `distillation_loss` reports beside the loss, in this order; sums over rows.
TERMS = ("loss", "kd", "ce", "teacher_mass", "tail_mass", "top1_agree")


def distillation_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_NK: torch.Tensor,
    teacher_logits_NK: torch.Tensor,
    teacher_lse_N: torch.Tensor,
    labels_N: torch.Tensor,
    loss: LossConfig,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss (fp32 scalar, differentiable) and the detached sums named by TERMS (fp32, no host sync).

    `teacher_lse_N` is logsumexp(z / T) over the teacher's whole vocabulary at the loss's temperature T.
    No N×V tensor is made: the kernel walks the rows in chunks. With `shard`, weight and bias are that part of the head,
    a collective call of its group; the same sums on every rank, and the gradient of the hidden states is whole.
    """
    operands = (hidden_NH, weight_VH, ids_NK, teacher_logits_NK, teacher_lse_N)
    options: dict[str, Any] = {
        "labels_N": labels_N,
        "ce_weight": loss.ce_weight,
        "temperature": loss.temperature,
        "divergence": Divergence(loss.divergence, loss.divergence_parameter),
        "tail": loss.tail,
        "softcap": softcap,
        "vocab_size": vocab_size,
    }
    out: Any
    if shard is None:
        out = linear_sparse_kl(*operands, bias_V=bias_V, **options)
    else:
        out = vocab_parallel_sparse_kl(*operands, bias_Vs=bias_V, first_id=shard.first_id, group=shard.group, **options)
    sums = (out.loss_sum, out.kd_sum, out.ce_sum, out.teacher_mass_sum, out.student_tail_sum, out.top1_agree_sum)
    return out.loss_sum, torch.stack([term.detach().float() for term in sums])


def full_distillation_loss(
    hidden_NH: torch.Tensor,
    student: OutputHead,
    teacher_hidden_NG: torch.Tensor,
    teacher: OutputHead,
    labels_N: torch.Tensor,
    loss: LossConfig,
    *,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As distillation_loss, with the divergence over the whole vocabulary: there is no tail, and no mass outside it.

    The teacher's head is multiplied here, and again each time that targets which were kept (validation) are used.
    """
    out: Any = linear_full_kl(
        hidden_NH,
        student.weight_VH,
        teacher_hidden_NG,
        teacher.weight_VH,
        labels_N=labels_N,
        ce_weight=loss.ce_weight,
        temperature=loss.temperature,
        divergence=Divergence(loss.divergence, loss.divergence_parameter),
        bias_V=student.bias_V,
        teacher_bias_V=teacher.bias_V,
        softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        vocab_size=vocab_size,
    )
    none = torch.zeros_like(out.loss_sum)
    sums = (out.loss_sum, out.kd_sum, out.ce_sum, out.tokens, none, out.top1_agree_sum)
    return out.loss_sum, torch.stack([term.detach().float() for term in sums])


def per_token(sums: list[float], tokens: float) -> dict[str, float]:
    """Means over tokens by name, from sums in the order of TERMS, with the perplexity that the CE implies."""
    means = {name: value / tokens for name, value in zip(TERMS, sums, strict=True)}
    means["perplexity"] = math.exp(min(means["ce"], 80.0)) if math.isfinite(means["ce"]) else math.nan
    return means
