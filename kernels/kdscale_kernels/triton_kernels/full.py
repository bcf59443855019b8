# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The step of rows/torch_full.py as one Triton kernel: both models' logits in, loss out, gradient over the student's.

Legend: C rows (one program each), V vocabulary, T temperature.

A program owns one row of each side. The first sweep keeps an online log-sum-exp (Milakov and Gimelshein 2018) of both,
at T and, where T != 1, at 1, and the first id of each. The second sums the terms of the divergence and Σu. The last
writes dz = u - q·Σu and the cross-entropy's part over the student's row. Where Σu is a known constant (-1 for forward
KL) the second and the last sweep are one. Nothing is added atomically: the same bits on every run.

A bf16 gradient lies in the first half of the row's bytes, as in sparse.py, with a barrier for each block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdscale_kernels.rows.results import FullRowSums
from kdscale_kernels.triton_kernels.common import MAX_INT, NEG_INF, add_block, cap, is_nan, load_logit, warps_for
from kdscale_kernels.triton_kernels.divergences import divergence_terms
from kdscale_kernels.types import LossOptions


class Tile(NamedTuple):
    """Columns read at a time, and warps per program."""

    block_v: int
    warps: int


TILE = Tile(1024, 8)


@triton.jit
def _load(z_ptr, cols, vocab, softcap, SOFTCAP: tl.constexpr):
    """A block of a row, capped: (logits, -inf beyond the vocabulary; slope of the cap)."""
    z = tl.load(z_ptr + cols, mask=cols < vocab, other=NEG_INF)
    if SOFTCAP:
        capped, slope = cap(z, softcap)
        return tl.where(cols < vocab, capped, NEG_INF), slope
    return z, z


@triton.jit
def _sweep(z_ptr, vocab, inv_t, softcap, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """(log-sum-exp at T = 1, at T, first id of the maximum) of one row."""
    cols_V = tl.arange(0, BLOCK_V)
    top = tl.full((), float("-inf"), tl.float32)
    plain_sum = tl.full((), 0.0, tl.float32)
    tempered_sum = tl.full((), 0.0, tl.float32)
    first = tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK_V):
        z, _ = _load(z_ptr, start + cols_V, vocab, softcap, SOFTCAP)
        block_top = tl.max(z, 0)
        block_first = tl.min(tl.where(z == block_top, start + cols_V, MAX_INT), 0)
        first = tl.where(block_top > top, block_first, first)
        top, plain_sum, tempered_sum = add_block(z, top, plain_sum, tempered_sum, inv_t, TEMPERED)
    plain_lse = tl.where(top == NEG_INF, float("nan"), top + tl.log(plain_sum))
    lse = plain_lse
    if TEMPERED:
        lse = tl.where(top == NEG_INF, float("nan"), top * inv_t + tl.log(tempered_sum))
    return plain_lse, lse, first


@triton.jit
def full_kl_rows_kernel(
    z_ptr,  # [*, V] fp32, the student's; each row is destroyed
    teacher_ptr,  # [*, V] fp32, only read
    dz_ptr,  # [*, V], the same memory as z: fp32, or bf16 in the first half of each row
    labels_ptr,  # [C] int64
    sums_ptr,  # [5, C] fp32, in the order of FullRowSums
    stride_z,
    stride_teacher,
    stride_dz,
    count,  # C
    vocab,
    temperature,
    ce_weight,
    parameter,
    rest,  # 1 - parameter, rounded once
    softcap,
    teacher_softcap,
    DIVERGENCE: tl.constexpr,
    GRADIENT_SUM: tl.constexpr,  # None: not a constant
    HAS_KD: tl.constexpr,
    HAS_CE: tl.constexpr,
    TEMPERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    BF16_GRAD: tl.constexpr,  # dz is narrower than z
    BLOCK_V: tl.constexpr,
):
    """One row of both models: the sums of its losses and, with WANT_GRAD, dz."""
    c = tl.program_id(0).to(tl.int64)
    z_ptr += c * stride_z
    teacher_ptr += c * stride_teacher
    dz_ptr += c * stride_dz
    cols_V = tl.arange(0, BLOCK_V)
    inv_t = 1.0 / temperature

    label = tl.load(labels_ptr + c)
    label_inside = (label >= 0) & (label < vocab)
    label_z = load_logit(z_ptr, label, label_inside, softcap, SOFTCAP)
    teacher_label_z = load_logit(teacher_ptr, label, label_inside, teacher_softcap, TEACHER_SOFTCAP)
    plain_lse, lse, first = _sweep(z_ptr, vocab, inv_t, softcap, TEMPERED, SOFTCAP, BLOCK_V)
    teacher_plain_lse, teacher_lse, teacher_first = _sweep(
        teacher_ptr, vocab, inv_t, teacher_softcap, TEMPERED, TEACHER_SOFTCAP, BLOCK_V
    )
    ce = plain_lse - label_z
    agree = (first == teacher_first) & ~is_nan(lse + teacher_lse)

    # In one sweep with the gradient where Σu is known: u then never waits.
    ONE_SWEEP: tl.constexpr = WANT_GRAD and (GRADIENT_SUM is not None or not HAS_KD)
    total = tl.full((), 0.0 if GRADIENT_SUM is None else GRADIENT_SUM, tl.float32)
    terms_V = tl.full((BLOCK_V,), 0.0, tl.float32)
    if not ONE_SWEEP:
        u_V = tl.full((BLOCK_V,), 0.0, tl.float32)
        for start in range(0, vocab, BLOCK_V):
            cols = start + cols_V
            z, _ = _load(z_ptr, cols, vocab, softcap, SOFTCAP)
            t, _ = _load(teacher_ptr, cols, vocab, teacher_softcap, TEACHER_SOFTCAP)
            logq = z * inv_t - lse
            terms, u = divergence_terms(t * inv_t - teacher_lse, logq, cols < vocab, parameter, rest, DIVERGENCE, False)
            terms_V += terms
            u_V += u
        if GRADIENT_SUM is None:
            total = tl.sum(u_V, 0)

    if WANT_GRAD:
        label_weight = tl.where(label_inside, ce_weight, float("nan"))  # a label outside the vocabulary poisons its row
        kd_scale = (1.0 - ce_weight) * temperature
        for start in range(0, vocab, BLOCK_V):
            cols = start + cols_V
            z, slope = _load(z_ptr, cols, vocab, softcap, SOFTCAP)
            t, _ = _load(teacher_ptr, cols, vocab, teacher_softcap, TEACHER_SOFTCAP)
            if BF16_GRAD:
                tl.debug_barrier()
            logq = z * inv_t - lse
            terms, u = divergence_terms(t * inv_t - teacher_lse, logq, cols < vocab, parameter, rest, DIVERGENCE, False)
            if ONE_SWEEP:
                terms_V += terms
            dz = tl.full((BLOCK_V,), 0.0, tl.float32)
            if HAS_KD:
                dz += kd_scale * (u - tl.exp(logq) * total)
            if HAS_CE:
                dz += label_weight * tl.exp(z - plain_lse) - tl.where(cols == label, ce_weight, 0.0)
            if SOFTCAP:
                dz *= slope
            tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < vocab)

    kd = tl.sum(terms_V, 0)
    loss = ce_weight * ce + (1.0 - ce_weight) * temperature * temperature * kd
    if not HAS_CE:
        loss = temperature * temperature * kd
    elif not HAS_KD:
        loss = ce
    tl.store(sums_ptr + c, loss)
    tl.store(sums_ptr + count + c, kd)
    tl.store(sums_ptr + 2 * count + c, ce)
    tl.store(sums_ptr + 3 * count + c, teacher_plain_lse - teacher_label_z)
    tl.store(sums_ptr + 4 * count + c, agree.to(tl.float32))


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
    """RowSteps.full for fp32 logits with unit column stride.

    With want_grad the student's rows become dloss/dz: z_CV itself or, with grad_dtype bfloat16, a bf16 view of the
    first half of each row's bytes. The teacher's are left as they are. A label outside the vocabulary makes the
    cross-entropies NaN and, where it has a weight, loss and gradient too.
    """
    count, vocab = z_CV.shape
    for name, logits in (("z_CV", z_CV), ("teacher_CV", teacher_CV)):
        if logits.dtype != torch.float32 or logits.shape != z_CV.shape or (vocab > 1 and logits.stride(1) != 1):
            raise ValueError(
                f"{name}: expected fp32 [{count}, {vocab}] rows of unit column stride, "
                f"got {logits.dtype} {list(logits.shape)}, strides {logits.stride()}"
            )
    bf16_grad = grad_dtype == torch.bfloat16
    dz_CV = z_CV.view(torch.bfloat16)[:, :vocab] if bf16_grad else z_CV
    sums_5C = torch.empty(len(FullRowSums._fields), count, dtype=torch.float32, device=z_CV.device)
    if count == 0:
        return sums_5C, dz_CV
    with torch.cuda.device_of(z_CV):  # Triton launches on the current device, whatever the tensors are on
        full_kl_rows_kernel[(count,)](
            z_CV,
            teacher_CV,
            dz_CV,
            labels_C.contiguous(),
            sums_5C,
            z_CV.stride(0),
            teacher_CV.stride(0),
            dz_CV.stride(0),
            count,
            vocab,
            float(options.temperature),
            float(options.ce_weight),
            float(options.divergence.parameter),
            1.0 - options.divergence.parameter,
            float(options.softcap or 1.0),
            float(teacher_softcap or 1.0),
            DIVERGENCE=options.divergence.name,
            GRADIENT_SUM=options.divergence.info.gradient_sum,
            HAS_KD=options.ce_weight < 1.0,
            HAS_CE=options.ce_weight > 0.0,
            TEMPERED=options.temperature != 1.0,
            SOFTCAP=options.softcap is not None,
            TEACHER_SOFTCAP=teacher_softcap is not None,
            WANT_GRAD=want_grad,
            BF16_GRAD=bf16_grad,
            BLOCK_V=TILE.block_v if z_CV.device.type != "cpu" else min(TILE.block_v, 256),
            num_warps=warps_for(TILE.warps),
            num_stages=1,
        )
    return sums_5C, dz_CV
