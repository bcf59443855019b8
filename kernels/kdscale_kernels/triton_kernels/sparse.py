# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The step of rows/torch_sparse.py as one Triton kernel: logits in, loss out, gradient written over the logits.

Legend: C rows (one program each), V vocabulary, K teacher entries, T temperature.

A program reads its row twice. First the K entries are gathered and their places masked, so that the sweep sees the
tail alone: online log-sum-exp (Milakov and Gimelshein 2018) at T and, where T != 1, at 1. Then come the losses, on one
tile of K values. The second sweep writes dz over z, and the K values go to their places last. torch_sparse.py has the
formulas, and says why no denominator holds the tail's mass.

Each row belongs to one program and nothing is added atomically: the same bits on every run. Barriers order the steps
that touch one address from several threads. A bf16 gradient of fp32 logits lies in the first half of the row's bytes:
its block b covers fp32 columns that blocks 0..b have read, hence a barrier between each block's load and store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdscale_kernels.rows.results import RowSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.triton_kernels.common import (
    MASKED,
    NEG_INF,
    Tile,
    add_block,
    cap,
    is_nan,
    load_logit,
    load_tail,
    logaddexp,
    logsumexp,
    warps_for,
)
from kdscale_kernels.triton_kernels.divergences import LOG_TAIL_FLOOR, divergence_terms
from kdscale_kernels.triton_kernels.limits import MAX_ENTRIES
from kdscale_kernels.types import LossOptions

TILES = (Tile(256, 4096, 8), Tile(1024, 1024, 8), Tile(MAX_ENTRIES, 4096, 32))
DTYPES = (torch.float32, torch.bfloat16)


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
    covers_vocab_ptr,  # [C] bool
    labels_ptr,  # [C] int64
    ce_weights_ptr,  # [C] fp32, with ROW_WEIGHTS in the place of ce_weight
    sums_ptr,  # [6, C] fp32, in the order of RowSums
    stride_z,
    stride_dz,
    count,  # C
    vocab,
    entries,  # K
    temperature,
    ce_weight,
    parameter,
    rest,  # 1 - parameter, rounded once
    softcap,
    DIVERGENCE: tl.constexpr,
    GRADIENT_SUM: tl.constexpr,  # None: not a constant
    FLOORS_TAIL: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr,
    TEMPERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    BF16_GRAD: tl.constexpr,  # dz is narrower than z
    HAS_ROWS: tl.constexpr,
    ROW_WEIGHTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: the sums of its losses and, with WANT_GRAD, dz."""
    c = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + c) if HAS_ROWS else c
    z_ptr += row * stride_z
    dz_ptr += row * stride_dz
    cols_V = tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK_K)
    inv_t = 1.0 / temperature
    if ROW_WEIGHTS:
        ce_weight = tl.load(ce_weights_ptr + c)

    ids_K = tl.load(ids_ptr + c * entries + k, mask=k < entries, other=0)
    used_K = tl.load(used_ptr + c * entries + k, mask=k < entries, other=0) != 0
    logp_K = tl.load(logp_ptr + c * entries + k, mask=k < entries, other=NEG_INF)
    inside_K = used_K & (ids_K >= 0) & (ids_K < vocab)
    support_K = tl.load(z_ptr + ids_K, mask=inside_K, other=0.0).to(tl.float32)
    slope_K = support_K
    if SOFTCAP:
        support_K, slope_K = cap(support_K, softcap)
    support_K = tl.where(used_K, tl.where(inside_K, support_K, float("nan")), NEG_INF)
    label = tl.load(labels_ptr + c)
    label_z = load_logit(z_ptr, label, (label >= 0) & (label < vocab), softcap, SOFTCAP)
    top1 = tl.load(top1_ptr + c)
    top1_z = load_logit(z_ptr, top1, (top1 >= 0) & (top1 < vocab), softcap, SOFTCAP)

    tl.debug_barrier()  # the gathers above come before, the sweep below after this mask
    tl.store(z_ptr + ids_K, tl.full((BLOCK_K,), MASKED if SOFTCAP else NEG_INF, tl.float32), mask=inside_K)
    tl.debug_barrier()

    top = tl.full((), float("-inf"), tl.float32)  # of the tail only: a small tail must not underflow
    plain_sum = tl.full((), 0.0, tl.float32)
    tempered_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK_V):
        z, _ = load_tail(z_ptr, start + cols_V, vocab, softcap, SOFTCAP)
        top, plain_sum, tempered_sum = add_block(z, top, plain_sum, tempered_sum, inv_t, TEMPERED)
    if not TEMPERED:
        tempered_sum = plain_sum

    plain_lse = logaddexp(logsumexp(support_K), top + tl.log(plain_sum))
    ce = plain_lse - label_z
    tail = top * inv_t + tl.log(tempered_sum)
    tempered_K = support_K * inv_t
    support_lse = logsumexp(tempered_K)
    lse = logaddexp(support_lse, tail)
    student_tail = tl.exp(tail - lse)
    logq_tail = tail - lse
    logp_tail = tl.load(logp_tail_ptr + c)
    count_tail = tl.load(covers_vocab_ptr + c) == 0
    teacher_mass = tl.sum(tl.exp(logp_K), 0)
    if TAIL == "renormalised":
        logp_K = logp_K - logsumexp(logp_K)
        lse = support_lse + 0.0 * tl.where(tail == NEG_INF, 0.0, tail)  # a NaN in the tail still poisons
        logp_tail = tl.full((), float("-inf"), tl.float32)
        logq_tail = logp_tail
    if TAIL != "bucket":
        count_tail = tl.full((), 0, tl.int1)
    elif FLOORS_TAIL:
        logp_tail = tl.where(logp_tail < LOG_TAIL_FLOOR, LOG_TAIL_FLOOR, logp_tail)
    logq_K = tempered_K - lse
    terms_K, u_K = divergence_terms(logp_K, logq_K, used_K, parameter, rest, DIVERGENCE, TAIL == "truncated")
    term_tail, u_tail = divergence_terms(
        logp_tail, logq_tail, count_tail, parameter, rest, DIVERGENCE, TAIL == "truncated"
    )
    kd = tl.sum(terms_K, 0) + term_tail
    if GRADIENT_SUM is not None and TAIL != "truncated":
        u_sum = tl.full((), GRADIENT_SUM, tl.float32)  # known: its rounding error must not reach the gradient
    else:
        u_sum = tl.sum(u_K, 0) + u_tail
    loss = ce_weight * ce + (1.0 - ce_weight) * temperature * temperature * kd
    if ROW_WEIGHTS:  # a weight of zero lets no infinite part become NaN
        loss = tl.where(ce_weight == 0.0, temperature * temperature * kd, tl.where(ce_weight == 1.0, ce, loss))
    if not HAS_CE:
        loss = temperature * temperature * kd
    elif not HAS_KD:
        loss = ce
    agree = (top1_z >= tl.maximum(top, tl.max(support_K, 0))) & ~is_nan(plain_lse)
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
            tail_share = tl.exp(top + tl.log(plain_sum) - plain_lse)
            ce_coefficient = ce_weight * tail_share / tl.where(plain_sum < 0.5, 0.5, plain_sum)
            values_K += ce_weight * tl.exp(support_K - plain_lse) - tl.where(ids_K == label, ce_weight, 0.0)
            if not TEMPERED:
                coefficient += ce_coefficient
        coefficient = tl.where(is_nan(loss), loss, coefficient)
        shift = tl.where(top == NEG_INF, 0.0, top)
        for start in range(0, vocab, BLOCK_V):
            cols = start + cols_V
            z, slope = load_tail(z_ptr, cols, vocab, softcap, SOFTCAP)
            if BF16_GRAD:
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


def tile_for(entries: int) -> Tile:
    """The tile for K entries per row (K <= MAX_ENTRIES)."""
    return next(tile for tile in TILES if entries <= tile.max_k)


def sparse_step(
    z_CV: Tensor,
    entries: TeacherEntries,
    labels_C: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
    rows_C: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RowSteps.sparse for fp32 or bf16 logits with unit column stride.

    rows_C [C] int64 picks the rows of z_CV (None: its rows in order). The picked rows are destroyed; with want_grad
    they become dloss/dz. dz is z_CV itself or, with grad_dtype bfloat16 on fp32 logits, a bf16 view of the first half
    of each row's bytes. A label or id outside the vocabulary turns its row into NaN.
    """
    count, k = entries.ids_NK.shape
    vocab = z_CV.shape[1]
    if z_CV.dtype not in DTYPES or (vocab > 1 and z_CV.stride(1) != 1) or k > MAX_ENTRIES:
        raise ValueError(
            f"z_CV: expected fp32 or bf16 rows of unit column stride and at most {MAX_ENTRIES} entries per row, "
            f"got {z_CV.dtype}, strides {z_CV.stride()}, {k} entries"
        )
    bf16_grad = grad_dtype == torch.bfloat16 and z_CV.dtype == torch.float32
    dz_CV = z_CV.view(torch.bfloat16)[:, :vocab] if bf16_grad else z_CV
    sums_6C = torch.empty(len(RowSums._fields), count, dtype=torch.float32, device=z_CV.device)
    if count == 0:
        return sums_6C, dz_CV
    tile = tile_for(k)
    with torch.cuda.device_of(z_CV):  # Triton launches on the current device, whatever the tensors are on
        sparse_kl_rows_kernel[(count,)](
            z_CV,
            dz_CV,
            entries.ids_NK if rows_C is None else rows_C,
            entries.ids_NK.contiguous(),
            entries.used_NK.contiguous(),
            entries.logp_NK.float().contiguous(),
            entries.logp_tail_N.float().contiguous(),
            entries.top1_N.contiguous(),
            entries.covers_vocab_N.contiguous(),
            labels_C.contiguous(),
            sums_6C if entries.ce_weight_N is None else entries.ce_weight_N.float().contiguous(),
            sums_6C,
            z_CV.stride(0),
            dz_CV.stride(0),
            count,
            vocab,
            k,
            float(options.temperature),
            float(options.ce_weight),
            float(options.divergence.parameter),
            1.0 - options.divergence.parameter,
            float(options.softcap or 1.0),
            DIVERGENCE=options.divergence.name,
            GRADIENT_SUM=options.divergence.info.gradient_sum,
            FLOORS_TAIL=options.divergence.info.floors_teacher_tail,
            # sampled targets have no tail either; their weights are in logp_NK
            TAIL="truncated" if options.tail == "sampled" else options.tail,
            HAS_KD=options.ce_weight < 1.0,
            HAS_CE=options.ce_weight > 0.0,
            TEMPERED=options.temperature != 1.0,
            SOFTCAP=options.softcap is not None,
            WANT_GRAD=want_grad,
            BF16_GRAD=bf16_grad,
            HAS_ROWS=rows_C is not None,
            ROW_WEIGHTS=entries.ce_weight_N is not None,
            BLOCK_V=tile.block_v if z_CV.device.type != "cpu" else min(tile.block_v, 256),
            BLOCK_K=max(2, triton.next_power_of_2(k)),
            num_warps=warps_for(tile.warps),
            num_stages=1,
        )
    return sums_6C, dz_CV
