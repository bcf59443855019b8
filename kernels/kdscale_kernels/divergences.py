"""Divergences between two short lists of buckets, with their gradients in closed form.

Legend: C rows, B buckets (the K teacher entries, then the tail as the last one).

For student log-probabilities lq and u = dD/dlq, the gradient with respect to the (tempered) logits of the buckets is
g = u - q·Σu. Each function returns D and g. A bucket of weight zero contributes zero: 0·log 0 is selected away before
it can become NaN, while a NaN input stays NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdscale_kernels.targets import TEACHER_TAIL_FLOOR
from kdscale_kernels.types import LossOptions


def divergence(logp_CB: Tensor, logq_CB: Tensor, counted_CB: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(D [C], dD/dy [C,B]) summed over the buckets marked in counted_CB.

    logq_CB are the log-probabilities of a distribution that sums to one over all B buckets. Truncated tails count
    only the support, so neither side sums to one over the counted buckets and D may be negative.
    Sources: forward/reverse KL; generalised JSD as in GKD (Agarwal et al. 2024, section 3): with M = β·P + (1-β)·Q,
    β·KL(P‖M) + (1-β)·KL(Q‖M), P the teacher; skewed KL as in DistiLLM (Ko et al. 2024, arXiv 2402.03898, section 3.1).
    """
    q_CB = logq_CB.exp()
    sums_to_one = options.tail in ("bucket", "renormalised")
    if options.divergence == "forward_kl":
        p_CB = _counted(logp_CB.exp(), counted_CB)
        terms_CB = _weighted(p_CB, logp_CB - logq_CB)
        # Σp is one by definition unless truncated; its rounding error must not reach the gradient.
        mass_C1: Tensor | float = 1.0 if sums_to_one else p_CB.sum(1, keepdim=True)
        grad_CB = q_CB * mass_C1 - p_CB
    elif options.divergence == "reverse_kl":
        counted_q_CB = _counted(q_CB, counted_CB)
        if options.tail == "bucket":
            logp_tail_C1 = logp_CB[:, -1:].clamp(min=math.log(TEACHER_TAIL_FLOOR))
            logp_CB = torch.cat([logp_CB[:, :-1], logp_tail_C1], 1)
        terms_CB = _weighted(counted_q_CB, logq_CB - logp_CB)
        u_CB = terms_CB if sums_to_one else terms_CB + counted_q_CB
        grad_CB = u_CB - q_CB * u_CB.sum(1, keepdim=True)
    elif options.divergence in ("skewed_forward_kl", "skewed_reverse_kl"):
        terms_CB, u_CB = _skewed(logp_CB, logq_CB, counted_CB, options)
        grad_CB = u_CB - q_CB * u_CB.sum(1, keepdim=True)
    else:
        beta = options.jsd_beta
        logm_CB = torch.logaddexp(logp_CB + math.log(beta), logq_CB + math.log1p(-beta))
        counted_q_CB = _counted(q_CB, counted_CB)
        u_CB = (1.0 - beta) * _weighted(counted_q_CB, logq_CB - logm_CB)
        terms_CB = beta * _weighted(_counted(logp_CB.exp(), counted_CB), logp_CB - logm_CB) + u_CB
        grad_CB = u_CB - q_CB * u_CB.sum(1, keepdim=True)
    return terms_CB.sum(1), grad_CB


def _skewed(logp_CB: Tensor, logq_CB: Tensor, counted_CB: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(terms, dD/dlog q) of KL(P ‖ s·P + (1-s)·Q), or of KL(Q ‖ s·Q + (1-s)·P): no bucket's ratio exceeds 1/s."""
    forward, log_own, log_other = (
        options.divergence == "skewed_forward_kl",
        math.log(options.skew),
        math.log1p(-options.skew),
    )
    first_CB, second_CB = (logp_CB, logq_CB) if forward else (logq_CB, logp_CB)
    logm_CB = torch.logaddexp(first_CB + log_own, second_CB + log_other)
    weight_CB = _counted(first_CB.exp(), counted_CB)
    terms_CB = _weighted(weight_CB, first_CB - logm_CB)
    share_CB = _weighted(weight_CB, torch.exp(second_CB + log_other - logm_CB))  # of the mixture that is the second's
    return terms_CB, -share_CB if forward else terms_CB + share_CB


def _counted(weight_CB: Tensor, counted_CB: Tensor) -> Tensor:
    return weight_CB.masked_fill(~counted_CB, 0.0)


def _weighted(weight_CB: Tensor, log_ratio_CB: Tensor) -> Tensor:
    return torch.where(weight_CB == 0.0, torch.zeros_like(weight_CB), weight_CB * log_ratio_CB)
