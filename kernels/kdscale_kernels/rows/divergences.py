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

from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR
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
    if options.divergence == "reverse_kl" and options.tail == "bucket":
        logp_tail_C1 = logp_CB[:, -1:].clamp(min=math.log(TEACHER_TAIL_FLOOR))
        logp_CB = torch.cat([logp_CB[:, :-1], logp_tail_C1], 1)
    terms_CB, u_CB = terms(logp_CB, logq_CB, counted_CB, options)
    if options.divergence == "reverse_kl" and not sums_to_one:
        u_CB = u_CB + _counted(q_CB, counted_CB)
    # Σp is one by definition unless truncated; its rounding error must not reach the gradient.
    known = options.divergence == "forward_kl" and sums_to_one
    total_C1: Tensor | float = -1.0 if known else u_CB.sum(1, keepdim=True)
    return terms_CB.sum(1), u_CB - q_CB * total_C1


def terms(logp_CB: Tensor, logq_CB: Tensor, counted_CB: Tensor | None, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(terms of D [C,B], u [C,B]) of any buckets (counted_CB None: all count), a whole row's or a part of it.

    Reverse KL leaves out of u the q that d(q·log q) adds: where all buckets count, a multiple of q drops out of
    u - q·Σu.
    """
    if options.divergence == "forward_kl":
        p_CB = _counted(logp_CB.exp(), counted_CB)
        return _weighted(p_CB, logp_CB - logq_CB), -p_CB
    if options.divergence == "reverse_kl":
        terms_CB = _weighted(_counted(logq_CB.exp(), counted_CB), logq_CB - logp_CB)
        return terms_CB, terms_CB
    if options.divergence != "jsd":
        return _skewed(logp_CB, logq_CB, counted_CB, options)
    beta = options.jsd_beta
    logm_CB = torch.logaddexp(logp_CB + math.log(beta), logq_CB + math.log1p(-beta))
    u_CB = (1.0 - beta) * _weighted(_counted(logq_CB.exp(), counted_CB), logq_CB - logm_CB)
    return beta * _weighted(_counted(logp_CB.exp(), counted_CB), logp_CB - logm_CB) + u_CB, u_CB


def _skewed(logp_CB: Tensor, logq_CB: Tensor, counted_CB: Tensor | None, options: LossOptions) -> tuple[Tensor, Tensor]:
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


def _counted(weight_CB: Tensor, counted_CB: Tensor | None) -> Tensor:
    return weight_CB if counted_CB is None else weight_CB.masked_fill(~counted_CB, 0.0)


def _weighted(weight_CB: Tensor, log_ratio_CB: Tensor) -> Tensor:
    return torch.where(weight_CB == 0.0, torch.zeros_like(weight_CB), weight_CB * log_ratio_CB)
