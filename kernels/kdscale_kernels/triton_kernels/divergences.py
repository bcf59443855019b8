# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The Triton maths of the divergences: a branch each, chosen when a body is compiled. Formulas: divergence.py."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kdscale_kernels.rows.divergences import MAX_LOG_RATIO, SMALL
from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR

LOG_TAIL_FLOOR = tl.constexpr(math.log(TEACHER_TAIL_FLOOR))
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_MIN_RATIO = tl.constexpr(math.exp(-MAX_LOG_RATIO))
_SMALL = tl.constexpr(SMALL)


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
def _log1p_excess(x):
    """rows/divergences.py's log1p_excess, to fp32."""
    t = x / (2.0 + x)
    w = t * t
    odd = 1.0 / 3.0 + w * (1.0 / 5.0 + w / 7.0)
    return t * (x - 2.0 * w * odd)


@triton.jit
def _skewed(first, second, gap, skew, rest):
    """rows/divergences.py's _skewed."""
    first = tl.where(first < second * _MIN_RATIO, second * _MIN_RATIO, first)
    gap = tl.where(gap > _MAX_LOG_RATIO, _MAX_LOG_RATIO, gap)
    part = rest * tl.exp(gap)
    x = rest * _expm1(gap)
    near = tl.abs(x) < _SMALL
    logs = tl.where(near, _log1p_excess(x), -tl.log(skew + part))
    return first, logs, tl.where(near, 0.0, x), x, part


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
        if TRUNCATED:
            over_p, over_q = _log_mixture_ratios(logp, logq, parameter, rest)
            terms = -_weighted(p, over_p)
            u = -rest * _weighted(p, tl.exp(-over_q))
        else:
            weight, logs, far, x, part = _skewed(p, q, logq - logp, parameter, rest)
            u = _weighted(weight, x * (part / (parameter + part)))
            terms = _weighted(weight, logs + far)
    elif DIVERGENCE == "skewed_reverse_kl":
        if TRUNCATED:
            over_q, over_p = _log_mixture_ratios(logq, logp, parameter, rest)
            terms = -_weighted(q, over_q)
            u = terms + rest * _weighted(q, tl.exp(-over_p))
        else:
            weight, logs, far, x, part = _skewed(q, p, logp - logq, parameter, rest)
            terms = _weighted(weight, logs + far)
            u = _weighted(q, logs + (parameter * far - part * (x - far)) / (parameter + part))
    elif DIVERGENCE == "jsd":
        over_p, over_q = _log_mixture_ratios(logp, logq, parameter, rest)
        u = -rest * _weighted(q, over_q)
        terms = u - parameter * _weighted(p, over_p)
    else:
        tl.static_assert(False, "divergence_terms has no branch for this divergence")
    return terms, u
