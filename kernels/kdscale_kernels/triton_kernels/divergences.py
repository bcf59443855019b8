# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The Triton maths of the divergences: a branch each, chosen when a body is compiled. Formulas: divergence.py."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR
from kdscale_kernels.triton_kernels.common import logaddexp

LOG_TAIL_FLOOR = tl.constexpr(math.log(TEACHER_TAIL_FLOOR))


@triton.jit
def _weighted(weight, log_ratio):
    return tl.where(weight == 0.0, 0.0, weight * log_ratio)


@triton.jit
def divergence_terms(logp, logq, counted, parameter, DIVERGENCE: tl.constexpr, TRUNCATED: tl.constexpr):
    """(terms of D, u) of buckets: dD/dlogit = u - q·Σu, but for forward KL p counts as -u."""
    p = tl.where(counted, tl.exp(logp), 0.0)
    q = tl.where(counted, tl.exp(logq), 0.0)
    if DIVERGENCE == "forward_kl":
        terms = _weighted(p, logp - logq)
        u = -p
    elif DIVERGENCE == "reverse_kl":
        terms = _weighted(q, logq - logp)
        u = terms + q if TRUNCATED else terms
    elif DIVERGENCE == "skewed_forward_kl":
        logm = logaddexp(logp + tl.log(parameter), logq + tl.log(1.0 - parameter))
        terms = _weighted(p, logp - logm)
        u = -_weighted(p, tl.exp(logq + tl.log(1.0 - parameter) - logm))
    elif DIVERGENCE == "skewed_reverse_kl":
        logm = logaddexp(logq + tl.log(parameter), logp + tl.log(1.0 - parameter))
        terms = _weighted(q, logq - logm)
        # q·(1-s)·p/m = (1-s)·q + s(1-s)·(p-q)·q/m; the first part moves no gradient where all of q counts. Fewer live
        # values than the plain form, which spilled on sm_90.
        u = terms + parameter * (1.0 - parameter) * _weighted(p - q, tl.exp(logq - logm))
        if TRUNCATED:
            u += (1.0 - parameter) * q
    elif DIVERGENCE == "jsd":
        logm = logaddexp(logp + tl.log(parameter), logq + tl.log(1.0 - parameter))
        u = (1.0 - parameter) * _weighted(q, logq - logm)
        terms = parameter * _weighted(p, logp - logm) + u
    else:
        tl.static_assert(False, "divergence_terms has no branch for this divergence")
    return terms, u
