# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""The steps of rows/torch_slices.py as Triton kernels, one program per row of a slice.

Legend: C rows (one program each), V vocabulary, S entries of the slice, K teacher entries, T temperature.

Which entries lie in the slice is a comparison with its edges, so nothing is sorted and nothing waits for the device. As
in sparse.py a row belongs to one program, nothing is added atomically, and barriers order the steps that touch one
address from several threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdscale_kernels.rows.results import EntryLogits, RowGradient, SliceExponentials, TailSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.triton_kernels.common import MASKED, NEG_INF, Tile, add_block, cap, load_tail, warps_for
from kdscale_kernels.triton_kernels.limits import MAX_ENTRIES
from kdscale_kernels.types import LossOptions

# A slice is far narrower than a vocabulary: small blocks waste less of its last one.
SLICE_TILES = (Tile(256, 1024, 4), Tile(1024, 1024, 8), Tile(MAX_ENTRIES, 4096, 16))


@triton.jit
def _take(z_ptr, into_ptr, id_, first, width, softcap, SOFTCAP: tl.constexpr):
    """Store the capped logit of one id if the id lies in the slice."""
    here = (id_ >= first) & (id_ < first + width)
    z = tl.load(z_ptr + (id_ - first), mask=here, other=0.0)
    if SOFTCAP:
        z, _slope = cap(z, softcap)
    tl.store(into_ptr, z, mask=here)


@triton.jit
def read_slice_kernel(
    z_ptr,  # [C, S] fp32, destroyed
    tempered_ptr,  # [C, S] what is kept: exp((z - top) / T)
    plain_ptr,  # [C, S] and exp(z - top)
    ids_ptr,  # [C, K] int64
    used_ptr,  # [C, K] bool
    labels_ptr,  # [C] int64
    top1_ptr,  # [C] int64
    support_ptr,  # [C, K] fp32, filled where the ids lie in the slice; label and first id likewise
    label_logit_ptr,  # [C]
    top1_logit_ptr,  # [C]
    tail_sums_ptr,  # [3, C] fp32, in the order of TailSums
    first,
    width,
    stride_z,
    stride_kept,
    count,  # C
    entries,  # K
    temperature,
    softcap,
    TEMPERED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_PLAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of a slice: its entries' logits, its tail sums and, with KEEP, its exponentials."""
    c = tl.program_id(0).to(tl.int64)
    z_ptr += c * stride_z
    cols_S = tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    inv_t = 1.0 / temperature

    ids_K = tl.load(ids_ptr + c * entries + k, mask=k < entries, other=0)
    used_K = tl.load(used_ptr + c * entries + k, mask=k < entries, other=0) != 0
    here_K = used_K & (ids_K >= first) & (ids_K < first + width)
    z_K = tl.load(z_ptr + (ids_K - first), mask=here_K, other=0.0)
    if SOFTCAP:
        z_K, _slope_K = cap(z_K, softcap)
    tl.store(support_ptr + c * entries + k, z_K, mask=here_K)
    _take(z_ptr, label_logit_ptr + c, tl.load(labels_ptr + c), first, width, softcap, SOFTCAP)
    _take(z_ptr, top1_logit_ptr + c, tl.load(top1_ptr + c), first, width, softcap, SOFTCAP)

    tl.debug_barrier()  # the gathers above come before, the sweep below after this mask
    tl.store(z_ptr + (ids_K - first), tl.full((BLOCK_K,), MASKED if SOFTCAP else NEG_INF, tl.float32), mask=here_K)
    tl.debug_barrier()

    top = tl.full((), float("-inf"), tl.float32)
    plain_sum = tl.full((), 0.0, tl.float32)
    tempered_sum = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK_S):
        z, _ = load_tail(z_ptr, start + cols_S, width, softcap, SOFTCAP)
        top, plain_sum, tempered_sum = add_block(z, top, plain_sum, tempered_sum, inv_t, TEMPERED)
    if not TEMPERED:
        tempered_sum = plain_sum
    tl.store(tail_sums_ptr + c, top)
    tl.store(tail_sums_ptr + count + c, plain_sum)
    tl.store(tail_sums_ptr + 2 * count + c, tempered_sum)

    if KEEP:
        shift = tl.where(top == NEG_INF, 0.0, top)
        for start in range(0, width, BLOCK_S):
            cols = start + cols_S
            z, slope = load_tail(z_ptr, cols, width, softcap, SOFTCAP)
            tempered = tl.exp((z - shift) * inv_t)
            if SOFTCAP:
                tempered *= slope
            at = c * stride_kept + cols
            tl.store(tempered_ptr + at, tempered.to(tempered_ptr.dtype.element_ty), mask=cols < width)
            if KEEP_PLAIN:
                one = tl.exp(z - shift)
                if SOFTCAP:
                    one *= slope
                tl.store(plain_ptr + at, one.to(plain_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def write_slice_kernel(
    z_ptr,  # [C, S] fp32 raw logits; KEPT: exp((z - top) / T) in dz's dtype
    plain_ptr,  # [C, S] KEPT and HAS_PLAIN: exp(z - top)
    dz_ptr,  # [C, S], z's memory: of its dtype, or bf16 in the first half of fp32 rows
    ids_ptr,  # [C, K] int64
    used_ptr,  # [C, K] bool
    values_ptr,  # [C, K] fp32
    labels_ptr,  # [C] int64
    at_label_ptr,  # [C] fp32
    a_ptr,  # [C] fp32 factor of the tempered exponential, and what is taken off its argument (not if KEPT)
    tail_ptr,
    b_ptr,  # the same of the other one
    lse_ptr,
    first,
    width,
    stride_z,
    stride_dz,
    entries,
    temperature,
    softcap,
    HAS_CE: tl.constexpr,
    HAS_PLAIN: tl.constexpr,  # CE beside a divergence at T != 1
    SOFTCAP: tl.constexpr,
    KEPT: tl.constexpr,
    BF16_GRAD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of a slice: dz from the logits or, with KEPT, from the exponentials."""
    c = tl.program_id(0).to(tl.int64)
    z_ptr += c * stride_z
    plain_ptr += c * stride_z
    dz_ptr += c * stride_dz
    cols_S = tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    inv_t = 1.0 / temperature
    a = tl.load(a_ptr + c)
    tail = tl.load(tail_ptr + c)
    label = tl.load(labels_ptr + c) - first
    at_label = tl.full((), 0.0, tl.float32)
    if HAS_CE:
        at_label = tl.load(at_label_ptr + c)
    b = tl.full((), 0.0, tl.float32)
    lse = b
    if HAS_PLAIN:
        b = tl.load(b_ptr + c)
        lse = tl.load(lse_ptr + c)

    for start in range(0, width, BLOCK_S):
        cols = start + cols_S
        if KEPT:
            dz = a * tl.load(z_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
            if HAS_PLAIN:
                dz += b * tl.load(plain_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        else:
            z = tl.load(z_ptr + cols, mask=cols < width, other=NEG_INF)
            slope = z
            if SOFTCAP:
                z, slope = cap(z, softcap)
            dz = a * tl.exp(z * inv_t - tail)
            if HAS_PLAIN:
                dz += b * tl.exp(z - lse)
            if SOFTCAP:
                dz *= slope
        if BF16_GRAD:
            tl.debug_barrier()  # the block's store overlaps columns that its load, in other threads, reads
        if HAS_CE:
            dz += tl.where(cols == label, at_label, 0.0)
        tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < width)

    ids_K = tl.load(ids_ptr + c * entries + k, mask=k < entries, other=0)
    used_K = tl.load(used_ptr + c * entries + k, mask=k < entries, other=0) != 0
    here_K = used_K & (ids_K >= first) & (ids_K < first + width)
    values_K = tl.load(values_ptr + c * entries + k, mask=here_K, other=0.0)
    tl.debug_barrier()  # the sweep wrote something at these places too
    tl.store(dz_ptr + (ids_K - first), values_K.to(dz_ptr.dtype.element_ty), mask=here_K)


def slice_tile(entries: int) -> Tile:
    """The tile for K entries per row (K <= MAX_ENTRIES)."""
    return next(tile for tile in SLICE_TILES if entries <= tile.max_k)


class TritonSlices:
    """row_steps.SliceSteps in Triton, for fp32 logits, contiguous."""

    def __init__(self, entries: TeacherEntries, labels_C: Tensor, options: LossOptions, edges: Sequence[int]):
        self._entries, self._labels_C, self._options, self._edges = entries, labels_C, options, edges
        self._tile = slice_tile(entries.ids_NK.shape[1])

    def read(
        self, z_CS: Tensor, index: int, entry_logits: EntryLogits, keep: Sequence[Tensor] = ()
    ) -> tuple[TailSums, SliceExponentials | None]:
        """See SliceSteps.read."""
        rows, width = z_CS.shape
        entries, options = self._entries, self._options
        sums_3C = torch.empty(3, rows, dtype=torch.float32, device=z_CS.device)
        if rows:
            with torch.cuda.device_of(z_CS):
                read_slice_kernel[(rows,)](
                    z_CS,
                    keep[0] if keep else z_CS,
                    keep[1] if len(keep) > 1 else z_CS,
                    entries.ids_NK.contiguous(),
                    entries.used_NK.contiguous(),
                    self._labels_C.contiguous(),
                    entries.top1_N.contiguous(),
                    *entry_logits,
                    sums_3C,
                    self._edges[index],
                    width,
                    z_CS.stride(0),
                    keep[0].stride(0) if keep else 0,
                    rows,
                    entries.ids_NK.shape[1],
                    float(options.temperature),
                    float(options.softcap or 1.0),
                    TEMPERED=options.temperature != 1.0,
                    KEEP=bool(keep),
                    KEEP_PLAIN=len(keep) > 1,
                    **self._launch_options(z_CS),
                )
        sums = TailSums(*sums_3C)
        if not keep:
            return sums, None
        return sums, SliceExponentials(tuple(keep), sums.top_C.masked_fill(sums.top_C == float("-inf"), 0.0))

    def write(self, z_CS: Tensor, index: int, gradient: RowGradient, grad_dtype: torch.dtype) -> Tensor:
        """See SliceSteps.write. A bf16 dz lies in the first half of each row's bytes."""
        bf16_grad = grad_dtype == torch.bfloat16
        dz_CS = z_CS.view(torch.bfloat16)[:, : z_CS.shape[1]] if bf16_grad else z_CS
        factors = (gradient.a_C, gradient.tail_C, torch.zeros_like(gradient.a_C) + gradient.b, gradient.lse_C)
        self._write(z_CS, z_CS, dz_CS, index, gradient, factors, kept=False)
        return dz_CS if bf16_grad else dz_CS.to(grad_dtype)

    def write_kept(self, kept: SliceExponentials, index: int, gradient: RowGradient) -> Tensor:
        """See SliceSteps.write_kept. dz takes the place of the first of the kept exponentials."""
        tempered_CS, plain_CS = kept.exponentials[0], kept.exponentials[-1]
        a_C = gradient.a_C * torch.exp(kept.top_C / self._options.temperature - gradient.tail_C)
        b_C = gradient.b * torch.exp(kept.top_C - gradient.lse_C)
        self._write(tempered_CS, plain_CS, tempered_CS, index, gradient, (a_C, a_C, b_C, b_C), kept=True)
        return tempered_CS

    def _write(
        self,
        z_CS: Tensor,
        plain_CS: Tensor,
        dz_CS: Tensor,
        index: int,
        gradient: RowGradient,
        factors: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        kept: bool,
    ) -> None:
        rows, width = dz_CS.shape
        entries, options = self._entries, self._options
        if rows == 0:
            return
        with torch.cuda.device_of(z_CS):
            write_slice_kernel[(rows,)](
                z_CS,
                plain_CS,
                dz_CS,
                entries.ids_NK.contiguous(),
                entries.used_NK.contiguous(),
                gradient.values_CK.contiguous(),
                self._labels_C.contiguous(),
                gradient.a_C if gradient.label_C is None else gradient.label_C,
                *factors,
                self._edges[index],
                width,
                z_CS.stride(0),
                dz_CS.stride(0),
                entries.ids_NK.shape[1],
                float(options.temperature),
                float(options.softcap or 1.0),
                HAS_CE=gradient.label_C is not None,
                HAS_PLAIN=gradient.has_plain,
                KEPT=kept,
                BF16_GRAD=dz_CS.dtype != z_CS.dtype,
                **self._launch_options(z_CS),
            )

    def _launch_options(self, z_CS: Tensor) -> dict[str, Any]:
        """Smaller blocks under the interpreter, so that tests on small heads go round the loop more than once."""
        on_cpu = z_CS.device.type == "cpu"
        return {
            "SOFTCAP": self._options.softcap is not None,
            "BLOCK_S": min(self._tile.block_v, 64) if on_cpu else self._tile.block_v,
            "BLOCK_K": max(2, triton.next_power_of_2(self._entries.ids_NK.shape[1])),
            "num_warps": warps_for(self._tile.warps),
            "num_stages": 1,
        }
