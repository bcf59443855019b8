# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The Triton maths of the divergences: a branch each, chosen when a body is compiled. Formulas: divergence.py."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kdscale_kernels.rows.divergences import MAX_LOG_RATIO
from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR
from kdscale_kernels.triton_kernels.common import logaddexp

LOG_TAIL_FLOOR = tl.constexpr(math.log(TEACHER_TAIL_FLOOR))
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _weighted(weight, log_ratio):
    return tl.where(weight == 0.0, 0.0, weight * log_ratio)


@triton.jit
def _expm1(x):
    """exp(x) - 1 to fp32, near 0 too: its series there, to x⁸."""
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0))))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) to fp32, near 0 too: the logarithm of the rounded sum, times what the rounding did to x."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / (rounded - 1.0)))


@triton.jit
def _log_mixture_ratios(logp, logq, share, rest):
    """rows/divergences.py's log_mixture_ratios, of p and q."""
    gap = tl.where(share > rest, logq - logp, logp - logq)
    gap = tl.where(gap > _MAX_LOG_RATIO, _MAX_LOG_RATIO, gap)  # not minimum, which may drop a NaN
    over_larger = _log1p(tl.minimum(share, rest) * _expm1(gap))
    over_smaller = over_larger - gap
    return tl.where(share > rest, over_larger, over_smaller), tl.where(share > rest, over_smaller, over_larger)


@triton.jit
def divergence_terms(logp, logq, counted, parameter, rest, DIVERGENCE: tl.constexpr, TRUNCATED: tl.constexpr):
    """(terms of D, u) of buckets: dD/dlogit = u - q·Σu, but for forward KL p counts as -u. rest: 1 - parameter."""
    p = tl.where(counted, tl.exp(logp), 0.0)
    q = tl.where(counted, tl.exp(logq), 0.0)
    if DIVERGENCE == "forward_kl":
        terms = _weighted(p, logp - logq)
        u = -p
    elif DIVERGENCE == "reverse_kl":
        terms = _weighted(q, logq - logp)
        u = terms + q if TRUNCATED else terms
    elif DIVERGENCE == "skewed_forward_kl":
        logm = logaddexp(logp + tl.log(parameter), logq + tl.log(rest))
        terms = _weighted(p, logp - logm)
        u = -_weighted(p, tl.exp(logq + tl.log(rest) - logm))
    elif DIVERGENCE == "skewed_reverse_kl":
        logm = logaddexp(logq + tl.log(parameter), logp + tl.log(rest))
        terms = _weighted(q, logq - logm)
        # q·(1-s)·p/m = (1-s)·q + s(1-s)·(p-q)·q/m; the first part moves no gradient where all of q counts. Fewer live
        # values than the plain form, which spilled on sm_90.
        u = terms + parameter * rest * _weighted(p - q, tl.exp(logq - logm))
        if TRUNCATED:
            u += rest * q
    elif DIVERGENCE == "jsd":
        over_p, over_q = _log_mixture_ratios(logp, logq, parameter, rest)
        u = -rest * _weighted(q, over_q)
        terms = u - parameter * _weighted(p, over_p)
    else:
        tl.static_assert(False, "divergence_terms has no branch for this divergence")
    return terms, u
