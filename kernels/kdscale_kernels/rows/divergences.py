"""The torch maths of the divergences, between two short lists of buckets or over a whole vocabulary.

Legend: C rows, B buckets (the K teacher entries, then the tail as the last one; or entries of the vocabulary).

For student log-probabilities log q and u = dD/dlog q, the gradient with respect to the (tempered) logits of the buckets
is u - q·Σu. A bucket of weight zero contributes zero: 0·log 0 is selected away before it can become NaN, while a NaN
input stays NaN. The formulas and their sources are in the table of divergence.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR
from kdscale_kernels.types import LossOptions

# Of p / q in a mixture: above it the smaller of the two is nothing (e^-80), and exp of it is still an fp32 number.
MAX_LOG_RATIO = 80.0
SMALL = 0.25  # below it x - log(1 + x) comes from a series


class Buckets(NamedTuple):
    """What a divergence compares."""

    logp_CB: Tensor  # the teacher's log-probabilities
    logq_CB: Tensor  # the student's
    counted_CB: Tensor | None  # False: the bucket takes no part; None: all count
    complete: bool  # q sums to one over the buckets that count: a multiple of q in u moves no gradient

    @property
    def p_CB(self) -> Tensor:  # noqa: N802
        """The teacher's probabilities; zero where the bucket does not count."""
        return self._counted(self.logp_CB.exp())

    @property
    def q_CB(self) -> Tensor:  # noqa: N802
        """The student's probabilities; zero where the bucket does not count."""
        return self._counted(self.logq_CB.exp())

    def _counted(self, weight_CB: Tensor) -> Tensor:
        return weight_CB if self.counted_CB is None else weight_CB.masked_fill(~self.counted_CB, 0.0)


class TorchDivergence(NamedTuple):
    """A divergence in torch, twice: as it is trained with and, for the tests, as its definition reads."""

    terms: Callable[[Buckets, float], tuple[Tensor, Tensor]]  # (terms of D [C,B], u [C,B]), given the parameter
    definition: Callable[[Tensor, Tensor, float], Tensor]  # D of two lists of log-probabilities; for autograd


def divergence(logp_CB: Tensor, logq_CB: Tensor, counted_CB: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(D [C], dD/dy [C,B] by the tempered logits y), summed over the buckets marked in counted_CB.

    logq_CB are the log-probabilities of a distribution that sums to one over all B buckets. Truncated tails count
    only the support, so neither side sums to one over the counted buckets and D may be negative.
    """
    info, complete = options.divergence.info, options.tail in ("bucket", "renormalised")
    if info.floors_teacher_tail and options.tail == "bucket":
        logp_tail_C1 = logp_CB[:, -1:].clamp(min=math.log(TEACHER_TAIL_FLOOR))
        logp_CB = torch.cat([logp_CB[:, :-1], logp_tail_C1], 1)
    terms_CB, u_CB = terms(Buckets(logp_CB, logq_CB, counted_CB, complete), options)
    # A sum that is known must not bring its rounding error into the gradient.
    known = info.gradient_sum if complete else None
    total_C1 = u_CB.sum(1, keepdim=True) if known is None else known
    return terms_CB.sum(1), u_CB - logq_CB.exp() * total_C1


def terms(buckets: Buckets, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(terms of D [C,B], u [C,B]) of any buckets, those of a whole row or of a part of it."""
    return TORCH_DIVERGENCES[options.divergence.name].terms(buckets, options.divergence.parameter)


def _forward_kl(buckets: Buckets, _: float) -> tuple[Tensor, Tensor]:
    p_CB = buckets.p_CB
    return _weighted(p_CB, buckets.logp_CB - buckets.logq_CB), -p_CB


def _reverse_kl(buckets: Buckets, _: float) -> tuple[Tensor, Tensor]:
    q_CB = buckets.q_CB
    terms_CB = _weighted(q_CB, buckets.logq_CB - buckets.logp_CB)
    return terms_CB, terms_CB if buckets.complete else terms_CB + q_CB


def _jsd(buckets: Buckets, beta: float) -> tuple[Tensor, Tensor]:
    over_p_CB, over_q_CB = log_mixture_ratios(buckets.logp_CB, buckets.logq_CB, beta)
    u_CB = (beta - 1.0) * _weighted(buckets.q_CB, over_q_CB)
    return u_CB - beta * _weighted(buckets.p_CB, over_p_CB), u_CB


def _skewed_forward_kl(buckets: Buckets, skew: float) -> tuple[Tensor, Tensor]:
    rest, p_CB = 1.0 - skew, buckets.p_CB
    if buckets.complete:
        parts = _skewed(p_CB, buckets.q_CB, buckets.logq_CB - buckets.logp_CB, skew)
        # u = -rest·p·q/m, plus rest·q, which moves no gradient
        u_CB = parts.x_CB * (parts.part_CB / (skew + parts.part_CB))
        return _weighted(parts.first_CB, parts.logs_CB + parts.far_CB), _weighted(parts.first_CB, u_CB)
    over_p_CB, over_q_CB = log_mixture_ratios(buckets.logp_CB, buckets.logq_CB, skew)
    return -_weighted(p_CB, over_p_CB), -rest * _weighted(p_CB, torch.exp(-over_q_CB))


def _skewed_reverse_kl(buckets: Buckets, skew: float) -> tuple[Tensor, Tensor]:
    rest, q_CB = 1.0 - skew, buckets.q_CB
    if buckets.complete:
        parts = _skewed(q_CB, buckets.p_CB, buckets.logp_CB - buckets.logq_CB, skew)
        # u = q·log(q / m) + rest·q·p/m, less rest·q, which moves no gradient
        moved_CB = skew * parts.far_CB - parts.part_CB * (parts.x_CB - parts.far_CB)
        u_CB = parts.logs_CB + moved_CB / (skew + parts.part_CB)
        return _weighted(parts.first_CB, parts.logs_CB + parts.far_CB), _weighted(parts.first_CB, u_CB)
    over_q_CB, over_p_CB = log_mixture_ratios(buckets.logq_CB, buckets.logp_CB, skew)
    terms_CB = -_weighted(q_CB, over_q_CB)
    return terms_CB, terms_CB + rest * _weighted(q_CB, torch.exp(-over_p_CB))


class _Skewed(NamedTuple):
    """Of KL(first ‖ m) over all buckets, with m = first·(1 + x): its terms are first·(logs + far)."""

    first_CB: Tensor
    logs_CB: Tensor  # x - log(1 + x) where x is near 0, else -log(1 + x)
    far_CB: Tensor  # x, but 0 where it is near 0
    x_CB: Tensor
    part_CB: Tensor  # second's part of m / first, which is skew more


def _skewed(first_CB: Tensor, second_CB: Tensor, gap_CB: Tensor, skew: float) -> _Skewed:
    """KL(first ‖ m) as the sum of first·(x - log(1 + x)), since first·x sums to zero; `gap_CB`: log(second / first).

    Each is of second order in 1 - skew, as the sum is, so that nothing cancels where the skew is nearly 1.
    """
    rest, least_CB = 1.0 - skew, second_CB * math.exp(-MAX_LOG_RATIO)
    first_CB, gap_CB = torch.where(first_CB < least_CB, least_CB, first_CB), gap_CB.clamp(max=MAX_LOG_RATIO)
    part_CB, x_CB = rest * gap_CB.exp(), rest * torch.expm1(gap_CB)
    near_CB = x_CB.abs() < SMALL
    logs_CB = torch.where(near_CB, log1p_excess(x_CB), -torch.log(skew + part_CB))
    return _Skewed(first_CB, logs_CB, x_CB.masked_fill(near_CB, 0.0), x_CB, part_CB)


def log1p_excess(x: Tensor) -> Tensor:
    """x - log(1 + x) for |x| < 1/4, by log(1 + x) = 2·artanh(t) with t = x / (2 + x)."""
    t = x / (2.0 + x)
    w = t * t
    odd = 1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w / 13))))
    return t * (x - 2.0 * w * odd)


def log_mixture(first_CB: Tensor, second_CB: Tensor, share: float) -> Tensor:
    """log(share·exp(first) + (1 - share)·exp(second))."""
    return torch.logaddexp(first_CB + math.log(share), second_CB + math.log1p(-share))


def log_mixture_ratios(first: Tensor, second: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(log(m / first), log(m / second)) for m = share·first + (1 - share)·second, given the logarithms of both.

    m differs from the side with the larger share by a multiple of the smaller share, so that its ratio to that side
    comes from log1p and expm1: log m less log q would leave nothing but rounding of a share of 1e-7.
    """
    if share > 0.5:
        over_second, over_first = log_mixture_ratios(second, first, 1.0 - share)
        return over_first, over_second
    gap = (first - second).clamp(max=MAX_LOG_RATIO)
    over_second = torch.log1p(share * torch.expm1(gap))
    return over_second - gap, over_second


def _weighted(weight_CB: Tensor, log_ratio_CB: Tensor) -> Tensor:
    return torch.where(weight_CB == 0.0, torch.zeros_like(weight_CB), weight_CB * log_ratio_CB)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Σ p·log(p / q) as its definition reads; entries with p = 0 contribute nothing."""
    some = logp.detach() != float("-inf")
    return (logp[some].exp() * (logp[some] - logq[some])).sum()


def _jsd_definition(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    some_p, some_q = (log.detach() != float("-inf") for log in (logp, logq))
    over_p, _ = log_mixture_ratios(logp[some_p], logq[some_p], beta)
    _, over_q = log_mixture_ratios(logp[some_q], logq[some_q], beta)
    return -beta * (logp[some_p].exp() * over_p).sum() - (1.0 - beta) * (logq[some_q].exp() * over_q).sum()


TORCH_DIVERGENCES: dict[str, TorchDivergence] = {
    "forward_kl": TorchDivergence(_forward_kl, lambda logp, logq, _: kl(logp, logq)),
    "reverse_kl": TorchDivergence(_reverse_kl, lambda logp, logq, _: kl(logq, logp)),
    "jsd": TorchDivergence(_jsd, _jsd_definition),
    "skewed_forward_kl": TorchDivergence(
        _skewed_forward_kl, lambda logp, logq, skew: kl(logp, log_mixture(logp, logq, skew))
    ),
    "skewed_reverse_kl": TorchDivergence(
        _skewed_reverse_kl, lambda logp, logq, skew: kl(logq, log_mixture(logq, logp, skew))
    ),
}
