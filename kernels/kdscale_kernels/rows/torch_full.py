"""The row step of linear_full_kl: the logits of both models in, loss out, the student's overwritten by their gradient.

Legend: C rows of one chunk, V vocabulary, B columns of one block, T temperature.

With both log-sum-exps known, every divergence is a sum of terms over the vocabulary, and dz = u - q·Σu. The vocabulary
is walked in blocks of columns, so that the dozen arrays a divergence needs on its way are small and stay in the
cache. u waits in the teacher's logits, which nothing needs any more, until Σu is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.rows.divergences import Buckets, terms
from kdscale_kernels.rows.results import FullRowSums
from kdscale_kernels.rows.torch_sparse import mix
from kdscale_kernels.types import LossOptions

# 128 rows of 49152, one CPU thread: 512 to 8192 columns take 71 to 74 ms (JSD 92 to 106), all at once 164 (300).
BLOCK_COLUMNS = 2048


def full_step(
    z_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    options: LossOptions,
    *,
    teacher_softcap: float | None,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RowSteps.full for fp32 or fp64 logits, contiguous, of both models, all destroyed; dz is in their dtype.

    options.softcap is the student's. NaN on either side, or a row of -inf, makes its row NaN.
    """
    T = options.temperature
    for logits_CV, softcap in ((z_CV, options.softcap), (teacher_CV, teacher_softcap)):
        if softcap is not None:
            logits_CV.div_(softcap).tanh_().mul_(softcap)
    label_C = z_CV.gather(1, labels_C[:, None])[:, 0]
    plain_lse_C, lse_C = _lse(z_CV, T)
    teacher_plain_lse_C, teacher_lse_C = _lse(teacher_CV, T)
    ce_C = plain_lse_C - label_C
    teacher_ce_C = teacher_plain_lse_C - teacher_CV.gather(1, labels_C[:, None])[:, 0]
    same_C = z_CV.argmax(1) == teacher_CV.argmax(1)
    agree_C = (same_C & ~(lse_C + teacher_lse_C).isnan()).to(z_CV.dtype)

    kd_C, total_C = torch.zeros_like(ce_C), torch.zeros_like(ce_C)
    for columns in _blocks(z_CV):
        logq_CB = z_CV[:, columns] / T - lse_C[:, None]
        logp_CB = teacher_CV[:, columns] / T - teacher_lse_C[:, None]
        terms_CB, u_CB = terms(Buckets(logp_CB, logq_CB, None, True), options)
        kd_C += terms_CB.sum(1)
        if want_grad:
            total_C += u_CB.sum(1)
            teacher_CV[:, columns] = u_CB
    if (known := options.divergence.info.gradient_sum) is not None:
        total_C.fill_(known)  # its rounding error must not reach the gradient
    if want_grad:
        _write_gradient(z_CV, teacher_CV, total_C, lse_C, plain_lse_C, options)
        if options.ce_weight > 0.0:
            slope_C = 1.0 if options.softcap is None else 1.0 - (label_C / options.softcap) ** 2
            at_label_C = torch.full_like(label_C, -options.ce_weight) * slope_C
            z_CV.scatter_add_(1, labels_C[:, None], at_label_C[:, None])
    sums = FullRowSums(mix(options.ce_weight, ce_C, T * T * kd_C), kd_C, ce_C, teacher_ce_C, agree_C)
    return torch.stack(sums), z_CV


def _write_gradient(
    z_CV: Tensor, u_CV: Tensor, total_C: Tensor, lse_C: Tensor, plain_lse_C: Tensor, options: LossOptions
) -> None:
    """Turn z_CV (capped) into dz without the label's -ce_weight. A term of weight zero is left out: it may be NaN."""
    T, ce_weight = options.temperature, options.ce_weight
    for columns in _blocks(z_CV):
        z_CB = z_CV[:, columns]
        slope_CB = None if options.softcap is None else (z_CB / options.softcap).square_().neg_().add_(1.0)
        plain_CB = torch.exp(z_CB - plain_lse_C[:, None]) if ce_weight > 0.0 else None
        if ce_weight < 1.0:
            q_CB = plain_CB if plain_CB is not None and T == 1.0 else torch.exp(z_CB / T - lse_C[:, None])
            torch.sub(u_CV[:, columns], q_CB * total_C[:, None], out=z_CB).mul_((1.0 - ce_weight) * T)
            if plain_CB is not None:
                z_CB.add_(plain_CB, alpha=ce_weight)
        elif plain_CB is not None:
            z_CB.copy_(plain_CB)
        if slope_CB is not None:
            z_CB.mul_(slope_CB)


def _lse(z_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logsumexp of each row of z and of z / T. torch.logsumexp measured three times slower on a CPU."""
    top_C1 = z_CV.amax(1, keepdim=True)
    plain_C1, tempered_C1 = torch.zeros_like(top_C1), torch.zeros_like(top_C1)
    for columns in _blocks(z_CV):
        shifted_CB = z_CV[:, columns] - top_C1
        plain_C1 += torch.exp(shifted_CB).sum(1, keepdim=True)
        if temperature != 1.0:
            tempered_C1 += shifted_CB.div_(temperature).exp_().sum(1, keepdim=True)
    plain_lse_C = (top_C1 + plain_C1.log())[:, 0]
    if temperature == 1.0:
        return plain_lse_C, plain_lse_C
    return plain_lse_C, (top_C1 / temperature + tempered_C1.log())[:, 0]


def _blocks(z_CV: Tensor) -> list[slice]:
    vocab = z_CV.shape[1]
    return [slice(start, min(start + BLOCK_COLUMNS, vocab)) for start in range(0, vocab, BLOCK_COLUMNS)]


def full_buffers(vocab: int) -> int:
    """Arrays [C, V] held at once: the logits of both models and at most twelve blocks of columns."""
    return 2 + -(-12 * min(BLOCK_COLUMNS, vocab) // vocab)
