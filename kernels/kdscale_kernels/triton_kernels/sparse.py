# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The row step of rows.py as one Triton kernel: logits in, loss out, gradient written over the logits.

Legend: C rows (one program each), V vocabulary, K teacher entries, T temperature.

A program reads its row twice. First the K entries are gathered and their places masked, so that the sweep sees the
tail alone: online log-sum-exp (Milakov and Gimelshein 2018) at T and, where T != 1, at 1. Then the losses, on one tile
of K values. The second sweep writes dz over z, and the K values go to their places last. The formulas are those of
rows.py and divergences.py; see there for why no denominator holds the tail's mass.

A row is owned by one program and nothing is added atomically: the same bits on every run. Barriers order the steps
that touch one address from several threads. A bf16 gradient of fp32 logits lies in the first half of the row's bytes:
block b of it covers fp32 columns that blocks 0..b have read, hence a barrier between each block's load and store.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdscale_kernels.rows.limits import MAX_ENTRIES
from kdscale_kernels.rows.results import RowSums
from kdscale_kernels.rows.teacher_entries import TEACHER_TAIL_FLOOR, Targets
from kdscale_kernels.types import LossOptions

_NEG_INF = tl.constexpr(float("-inf"))


# Marks a masked place of a row with a soft-cap, where -inf is a logit like any other. The lowest bf16, also an fp32.
_MASKED = tl.constexpr(-3.3895313892515355e38)


_LOG_TAIL_FLOOR = tl.constexpr(math.log(TEACHER_TAIL_FLOOR))


class Tile(NamedTuple):
    """For up to max_k entries a row: columns read at a time, and warps a program."""

    max_k: int
    block_v: int
    warps: int


TILES = (Tile(256, 4096, 8), Tile(1024, 1024, 8), Tile(MAX_ENTRIES, 4096, 32))


DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def _cap(z, softcap):
    """(softcap·tanh(z / softcap), its slope). From exp, which every target has; absolute error about 1e-7·softcap."""
    tanh = 1.0 - 2.0 / (tl.exp(z * (2.0 / softcap)) + 1.0)
    return tanh * softcap, 1.0 - tanh * tanh


@triton.jit
def _is_nan(x):
    return x != x  # noqa: PLR0124 - only a NaN differs from itself


@triton.jit
def _logaddexp(a, b):
    top = tl.maximum(a, b)
    top = tl.where(top == _NEG_INF, 0.0, top)
    return top + tl.log(tl.exp(a - top) + tl.exp(b - top))


@triton.jit
def _logsumexp(x_K):
    top = tl.max(x_K, 0)
    top = tl.where(top == _NEG_INF, 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x_K - top), 0))


@triton.jit
def _weighted(weight, log_ratio):
    return tl.where(weight == 0.0, 0.0, weight * log_ratio)


@triton.jit
def _terms(logp, logq, counted, beta, DIVERGENCE: tl.constexpr, TRUNCATED: tl.constexpr):
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
        logm = _logaddexp(logp + tl.log(beta), logq + tl.log(1.0 - beta))
        terms = _weighted(p, logp - logm)
        u = -_weighted(p, tl.exp(logq + tl.log(1.0 - beta) - logm))
    elif DIVERGENCE == "skewed_reverse_kl":
        logm = _logaddexp(logq + tl.log(beta), logp + tl.log(1.0 - beta))
        terms = _weighted(q, logq - logm)
        # q·(1-β)·p/m = (1-β)·q + β(1-β)·(p-q)·q/m; the first part moves no gradient where all of q counts. Fewer live
        # values than the plain form, which spilled on sm_90.
        u = terms + beta * (1.0 - beta) * _weighted(p - q, tl.exp(logq - logm))
        if TRUNCATED:
            u += (1.0 - beta) * q
    else:
        logm = _logaddexp(logp + tl.log(beta), logq + tl.log(1.0 - beta))
        u = (1.0 - beta) * _weighted(q, logq - logm)
        terms = beta * _weighted(p, logp - logm) + u
    return terms, u


@triton.jit
def _load_tail(z_ptr, cols, vocab, softcap, SOFTCAP: tl.constexpr):
    """A block of a masked row, capped: (logits, -inf where masked or beyond the vocabulary; slope of the cap)."""
    if SOFTCAP:
        raw = tl.load(z_ptr + cols, mask=cols < vocab, other=_MASKED).to(tl.float32)
        capped, slope = _cap(raw, softcap)
        return tl.where(raw == _MASKED, _NEG_INF, capped), slope
    raw = tl.load(z_ptr + cols, mask=cols < vocab, other=_NEG_INF).to(tl.float32)
    return raw, raw


@triton.jit
def _online(z, top, one_sum, tempered_sum, inv_t, TEMPERED: tl.constexpr):
    """One block more of an online log-sum-exp: (maximum, Σexp(z - maximum), Σexp((z - maximum) / T) if TEMPERED)."""
    new_top = tl.maximum(top, tl.max(z, 0))
    shift = tl.where(new_top == _NEG_INF, 0.0, new_top)
    one_sum = one_sum * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
    if TEMPERED:
        scaled = tempered_sum * tl.exp((top - shift) * inv_t)
        tempered_sum = scaled + tl.sum(tl.exp((z - shift) * inv_t), 0)
    return new_top, one_sum, tempered_sum


@triton.jit
def _load_one(z_ptr, place, inside, softcap, SOFTCAP: tl.constexpr):
    """One logit, capped; NaN where the place is outside the vocabulary, so that a bad id poisons its row."""
    z = tl.load(z_ptr + place, mask=inside, other=float("nan")).to(tl.float32)
    if SOFTCAP:
        z, _slope = _cap(z, softcap)
    return z


@triton.jit
def sparse_kl_rows_kernel(
    z_ptr,  # [*, V] fp32 or bf16; each row is destroyed
    dz_ptr,  # [*, V], the same memory as z; of its dtype, or bf16 in the first half of fp32 rows
    rows_ptr,  # [C] int64: which row of z and dz; without HAS_ROWS row c is program c's
    ids_ptr,  # [C, K] int64, ascending but for unused slots
    used_ptr,  # [C, K] bool
    logp_ptr,  # [C, K] fp32
    logp_tail_ptr,  # [C] fp32
    top1_ptr,  # [C] int64
    whole_ptr,  # [C] bool
    labels_ptr,  # [C] int64
    sums_ptr,  # [6, C] fp32, in the order of RowSums
    stride_z,
    stride_dz,
    count,  # C
    vocab,
    entries,  # K
    temperature,
    ce_weight,
    beta,
    softcap,
    DIVERGENCE: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr,
    TEMPERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    NARROW: tl.constexpr,  # dz is narrower than z
    HAS_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + c) if HAS_ROWS else c
    z_ptr += row * stride_z
    dz_ptr += row * stride_dz
    cols_V = tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    inv_t = 1.0 / temperature

    ids_K = tl.load(ids_ptr + c * entries + k, mask=k < entries, other=0)
    used_K = tl.load(used_ptr + c * entries + k, mask=k < entries, other=0) != 0
    logp_K = tl.load(logp_ptr + c * entries + k, mask=k < entries, other=_NEG_INF)
    inside_K = used_K & (ids_K >= 0) & (ids_K < vocab)
    support_K = tl.load(z_ptr + ids_K, mask=inside_K, other=0.0).to(tl.float32)
    slope_K = support_K
    if SOFTCAP:
        support_K, slope_K = _cap(support_K, softcap)
    support_K = tl.where(used_K, tl.where(inside_K, support_K, float("nan")), _NEG_INF)
    label = tl.load(labels_ptr + c)
    label_z = _load_one(z_ptr, label, (label >= 0) & (label < vocab), softcap, SOFTCAP)
    top1 = tl.load(top1_ptr + c)
    top1_z = _load_one(z_ptr, top1, (top1 >= 0) & (top1 < vocab), softcap, SOFTCAP)

    tl.debug_barrier()  # the gathers above come before, the sweep below after this mask
    tl.store(z_ptr + ids_K, tl.full((BLOCK_K,), _MASKED if SOFTCAP else _NEG_INF, tl.float32), mask=inside_K)
    tl.debug_barrier()

    top = tl.full((), float("-inf"), tl.float32)  # of the tail only: a small tail must not underflow
    one_sum = tl.full((), 0.0, tl.float32)
    tempered_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK_V):
        z, _ = _load_tail(z_ptr, start + cols_V, vocab, softcap, SOFTCAP)
        top, one_sum, tempered_sum = _online(z, top, one_sum, tempered_sum, inv_t, TEMPERED)
    if not TEMPERED:
        tempered_sum = one_sum

    lse_one = _logaddexp(_logsumexp(support_K), top + tl.log(one_sum))
    ce = lse_one - label_z
    tail = top * inv_t + tl.log(tempered_sum)
    tempered_K = support_K * inv_t
    support_lse = _logsumexp(tempered_K)
    lse = _logaddexp(support_lse, tail)
    student_tail = tl.exp(tail - lse)
    logq_tail = tail - lse
    logp_tail = tl.load(logp_tail_ptr + c)
    count_tail = tl.load(whole_ptr + c) == 0
    teacher_mass = tl.sum(tl.exp(logp_K), 0)
    if TAIL == "renormalised":
        logp_K = logp_K - _logsumexp(logp_K)
        lse = support_lse + 0.0 * tl.where(tail == _NEG_INF, 0.0, tail)  # a NaN in the tail still poisons
        logp_tail = tl.full((), float("-inf"), tl.float32)
        logq_tail = logp_tail
    if TAIL != "bucket":
        count_tail = tl.full((), 0, tl.int1)
    elif DIVERGENCE == "reverse_kl":
        logp_tail = tl.where(logp_tail < _LOG_TAIL_FLOOR, _LOG_TAIL_FLOOR, logp_tail)
    logq_K = tempered_K - lse
    terms_K, u_K = _terms(logp_K, logq_K, used_K, beta, DIVERGENCE, TAIL == "truncated")
    term_tail, u_tail = _terms(logp_tail, logq_tail, count_tail, beta, DIVERGENCE, TAIL == "truncated")
    kd = tl.sum(terms_K, 0) + term_tail
    if DIVERGENCE == "forward_kl" and TAIL != "truncated":
        u_sum = tl.full((), -1.0, tl.float32)  # Σp is one by definition; its rounding must not reach the gradient
    else:
        u_sum = tl.sum(u_K, 0) + u_tail
    loss = ce_weight * ce + (1.0 - ce_weight) * temperature * temperature * kd
    if not HAS_CE:
        loss = temperature * temperature * kd
    elif not HAS_KD:
        loss = ce
    agree = (top1_z >= tl.maximum(top, tl.max(support_K, 0))) & ~_is_nan(lse_one)
    tl.store(sums_ptr + c, loss)
    tl.store(sums_ptr + count + c, kd)
    tl.store(sums_ptr + 2 * count + c, ce)
    tl.store(sums_ptr + 3 * count + c, teacher_mass)
    tl.store(sums_ptr + 4 * count + c, student_tail)
    tl.store(sums_ptr + 5 * count + c, agree.to(tl.float32))

    if WANT_GRAD:
        # An empty tail has sum 0 and only zeros to scale; anything else has sum >= 1 by the choice of shift.
        kd_scale = (1.0 - ce_weight) * temperature
        coefficient = kd_scale * (u_tail - tl.exp(logq_tail) * u_sum) / tl.where(tempered_sum < 0.5, 0.5, tempered_sum)
        values_K = kd_scale * (u_K - tl.exp(logq_K) * u_sum)
        ce_coefficient = tl.full((), 0.0, tl.float32)
        if HAS_CE:
            tail_share = tl.exp(top + tl.log(one_sum) - lse_one)
            ce_coefficient = ce_weight * tail_share / tl.where(one_sum < 0.5, 0.5, one_sum)
            values_K += ce_weight * tl.exp(support_K - lse_one) - tl.where(ids_K == label, ce_weight, 0.0)
            if not TEMPERED:
                coefficient += ce_coefficient
        coefficient = tl.where(_is_nan(loss), loss, coefficient)
        shift = tl.where(top == _NEG_INF, 0.0, top)
        for start in range(0, vocab, BLOCK_V):
            cols = start + cols_V
            z, slope = _load_tail(z_ptr, cols, vocab, softcap, SOFTCAP)
            if NARROW:
                tl.debug_barrier()
            dz = coefficient * tl.exp((z - shift) * inv_t)
            if HAS_CE:
                if TEMPERED:
                    dz += ce_coefficient * tl.exp(z - shift)
                dz -= tl.where(cols == label, ce_weight, 0.0)
            if SOFTCAP:
                dz *= slope
            tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < vocab)
        if SOFTCAP:
            values_K *= slope_K
        tl.debug_barrier()  # the sweep wrote something at these places too
        tl.store(dz_ptr + ids_K, values_K.to(dz_ptr.dtype.element_ty), mask=inside_K)


def warps_for(warps: int) -> int:
    """As many threads on AMD, whose wavefronts hold 64 and not 32."""
    return warps // 2 if torch.version.hip else warps


def tile_for(entries: int) -> Tile:
    """The tile for K entries a row (K <= MAX_ENTRIES)."""
    return next(tile for tile in TILES if entries <= tile.max_k)


def rows_step_triton(
    z_NV: Tensor,
    targets: Targets,
    labels_C: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
    rows_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sums [6, C] in the order of RowSums, dz): rows.rows_step for fp32 or bf16 logits with unit column stride.

    rows_C [C] int64 picks the rows of z_NV (None: its rows in order). The picked rows are destroyed; with want_grad
    they become dloss/dz. dz is z_NV itself or, with grad_dtype bfloat16 on fp32 logits, a bf16 view of the first half
    of each row's bytes. A label or id outside the vocabulary turns its row into NaN.
    """
    count, entries = targets.ids_NK.shape
    vocab = z_NV.shape[1]
    if z_NV.dtype not in DTYPES or (vocab > 1 and z_NV.stride(1) != 1) or entries > MAX_ENTRIES:
        raise ValueError(
            f"z_NV: expected fp32 or bf16 rows of unit column stride and at most {MAX_ENTRIES} entries a row, "
            f"got {z_NV.dtype}, strides {z_NV.stride()}, {entries} entries"
        )
    narrow = grad_dtype == torch.bfloat16 and z_NV.dtype == torch.float32
    dz_NV = z_NV.view(torch.bfloat16)[:, :vocab] if narrow else z_NV
    sums_6C = torch.empty(len(RowSums._fields), count, dtype=torch.float32, device=z_NV.device)
    if count == 0:
        return sums_6C, dz_NV
    tile = tile_for(entries)
    with torch.cuda.device_of(z_NV):  # Triton launches on the current device, whatever the tensors are on
        sparse_kl_rows_kernel[(count,)](
            z_NV,
            dz_NV,
            targets.ids_NK if rows_C is None else rows_C,
            targets.ids_NK.contiguous(),
            targets.used_NK.contiguous(),
            targets.logp_NK.float().contiguous(),
            targets.logp_tail_N.float().contiguous(),
            targets.top1_N.contiguous(),
            targets.whole_N.contiguous(),
            labels_C.contiguous(),
            sums_6C,
            z_NV.stride(0),
            dz_NV.stride(0),
            count,
            vocab,
            entries,
            float(options.temperature),
            float(options.ce_weight),
            float(options.divergence.parameter),
            float(options.softcap or 1.0),
            DIVERGENCE=options.divergence.name,
            # sampled targets have no tail either; their weights are in logp_NK
            TAIL="truncated" if options.tail == "sampled" else options.tail,
            HAS_KD=options.ce_weight < 1.0,
            HAS_CE=options.ce_weight > 0.0,
            TEMPERED=options.temperature != 1.0,
            SOFTCAP=options.softcap is not None,
            WANT_GRAD=want_grad,
            NARROW=narrow,
            HAS_ROWS=rows_C is not None,
            BLOCK_V=tile.block_v if z_NV.device.type != "cpu" else min(tile.block_v, 256),
            BLOCK_K=max(2, triton.next_power_of_2(entries)),
            num_warps=warps_for(tile.warps),
            num_stages=1,
        )
    return sums_6C, dz_NV
