# mypy: allow-untyped-defs
# (the arguments of jit bodies have no Python type)
"""Top-K and log-sum-exp of rows of logits as Triton kernels, exact and with deterministic ties.

Legend: C rows (one program each), V vocabulary, K entries kept, G groups of GROUP columns, J candidates.

One sweep of a row gives its log-sum-exp and the maximum of every group. The K groups that come first by (maximum
descending, group ascending) hold the K entries that come first by (value descending, id ascending): an entry outside
has K others before it, one in each. So the same selection runs twice, on G maxima and then on K·GROUP values.

A selection keeps the row in registers, finds the K-th largest value bit by bit (31 counts of "how many are at least
this"), takes what is above it and the first few that equal it, and writes them in order of id. No host sync.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdscale_kernels.triton_kernels.common import MAX_INT, NEG_INF, cap, is_nan, warps_for
from kdscale_kernels.triton_kernels.limits import GROUP, MAX_CANDIDATES, topk_limit
from kdscale_kernels.types import LossOptions


class SweepTile(NamedTuple):
    """Groups read at a time, and warps per program."""

    groups: int
    warps: int


class SelectTile(NamedTuple):
    """For up to max_j candidates per row: warps per program."""

    max_j: int
    warps: int


SWEEP_TILE = SweepTile(64, 8)
SELECT_TILES = (SelectTile(1024, 4), SelectTile(4096, 8), SelectTile(MAX_CANDIDATES, 16))


@triton.jit
def lse_groups_kernel(
    z_ptr,  # [C, V] fp32; capped in place with SOFTCAP
    lse_ptr,  # [C] fp32
    maxima_ptr,  # [C, groups] fp32; +inf where a group holds a NaN
    stride_z,
    vocab,
    groups,  # ceil(V / GROUP)
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One row: its log-sum-exp and the maximum of each group of columns."""
    c = tl.program_id(0).to(tl.int64)
    z_ptr += c * stride_z
    maxima_ptr += c * groups
    inv_t = 1.0 / temperature
    g = tl.arange(0, BLOCK_G)
    within = tl.arange(0, GROUP)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, groups, BLOCK_G):
        cols = (start + g)[:, None] * GROUP + within[None, :]
        z = tl.load(z_ptr + cols, mask=cols < vocab, other=NEG_INF)
        if SOFTCAP:
            z, _slope = cap(z, softcap)
            tl.store(z_ptr + cols, z, mask=cols < vocab)
            z = tl.where(cols < vocab, z, NEG_INF)
        # A maximum may drop a NaN: as +inf it is kept, its group comes first, and the sum below becomes NaN.
        maxima = tl.max(tl.where(is_nan(z), float("inf"), z), 1)
        tl.store(maxima_ptr + start + g, maxima, mask=start + g < groups)
        new_top = tl.maximum(top, tl.max(maxima, 0))
        shift = tl.where(new_top == NEG_INF, 0.0, new_top)
        block = tl.sum(tl.sum(tl.exp((z - shift) * inv_t), 1), 0)
        total = total * tl.exp((top - shift) * inv_t) + block
        top = new_top
    tl.store(lse_ptr + c, top * inv_t + tl.log(total))


@triton.jit
def select_kernel(
    values_ptr,  # [C, *] fp32
    groups_ptr,  # [C, count / GROUP] int64 ascending: candidate j is column groups[j // GROUP]·GROUP + j % GROUP
    ids_ptr,  # [C, K] int64: columns of the K first by (value descending, column ascending), in order of column
    kept_ptr,  # [C, K] fp32: their values
    stride_values,
    columns,  # valid columns of values
    count,  # J
    keep,  # K, at most the number of valid candidates
    HAS_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One row: the K candidates that come first by (value descending, column ascending)."""
    c = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_J)
    column_J = j
    if HAS_GROUPS:
        group_J = tl.load(groups_ptr + c * (count // GROUP) + j // GROUP, mask=j < count, other=0)
        column_J = group_J.to(tl.int32) * GROUP + j % GROUP
    valid_J = (j < count) & (column_J < columns)
    values_ptr += c * stride_values
    value_J = tl.load(values_ptr + column_J, mask=valid_J, other=NEG_INF)

    # Integers in the order of the floats: -0 is 0, and any NaN comes first. Below every float: places without one.
    bits_J = tl.where(value_J == 0.0, 0.0, value_J).to(tl.int32, bitcast=True)
    key_J = bits_J ^ ((bits_J >> 31) & MAX_INT)
    key_J = tl.where(is_nan(value_J), MAX_INT, key_J)
    key_J = tl.where(valid_J, key_J, -MAX_INT - 1)

    at_least_zero = tl.sum((key_J >= 0).to(tl.int32), 0)
    threshold = tl.where(at_least_zero >= keep, 0, -MAX_INT - 1)
    for step in range(31):
        higher = threshold | (1 << (30 - step))
        threshold = tl.where(tl.sum((key_J >= higher).to(tl.int32), 0) >= keep, higher, threshold)
    above_J = key_J > threshold
    equal_J = key_J == threshold  # never a place without a value: at least K places have one
    wanted = keep - tl.sum(above_J.to(tl.int32), 0)
    kept_J = above_J | (equal_J & (tl.cumsum(equal_J.to(tl.int32), 0) <= wanted))
    place_J = tl.cumsum(kept_J.to(tl.int32), 0) - 1
    tl.store(ids_ptr + c * keep + place_J, column_J, mask=kept_J)
    tl.store(kept_ptr + c * keep + place_J, value_J, mask=kept_J)


def topk_step(z_CV: Tensor, k: int, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """RowSteps.topk for fp32 logits, contiguous, within topk_limit. With a soft-cap z_CV is capped in place."""
    vocab = z_CV.shape[1]
    if (
        not z_CV.is_contiguous()
        or not 1 <= k <= vocab
        or z_CV.dtype != torch.float32
        or topk_limit(vocab, k, z_CV.dtype)
    ):
        raise ValueError(f"z_CV: expected contiguous fp32 and 1 <= k <= V, got {z_CV.dtype} {tuple(z_CV.shape)}, k={k}")
    with torch.cuda.device_of(z_CV):  # Triton launches on the current device, whatever the tensors are on
        return _topk_lse(z_CV, k, options.temperature, options.softcap)


def _topk_lse(z_CV: Tensor, k: int, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocab = z_CV.shape
    groups = -(-vocab // GROUP)
    lse_C = torch.empty(rows, dtype=torch.float32, device=z_CV.device)
    maxima_CG = torch.empty(rows, groups, dtype=torch.float32, device=z_CV.device)
    if rows:
        lse_groups_kernel[(rows,)](
            z_CV,
            lse_C,
            maxima_CG,
            z_CV.stride(0),
            vocab,
            groups,
            float(temperature),
            float(softcap or 1.0),
            SOFTCAP=softcap is not None,
            GROUP=GROUP,
            BLOCK_G=SWEEP_TILE.groups if z_CV.device.type != "cpu" else 4,
            num_warps=warps_for(SWEEP_TILE.warps),
            num_stages=1,
        )
    if k < groups and k * GROUP <= MAX_CANDIDATES:
        group_CK, _ = _select(maxima_CG, None, k)
        ids_CK, values_CK = _select(z_CV, group_CK, k)
    else:
        ids_CK, values_CK = _select(z_CV, None, k)
    values_CK, order_CK = torch.sort(values_CK, dim=1, descending=True, stable=True)
    return ids_CK.gather(1, order_CK), values_CK, lse_C


def _select(values_CV: Tensor, group_CM: Tensor | None, keep: int) -> tuple[Tensor, Tensor]:
    """Columns and values [C, keep] of the first by (value, column), in order of column."""
    rows, columns = values_CV.shape
    count = columns if group_CM is None else group_CM.shape[1] * GROUP
    ids_CK = torch.empty(rows, keep, dtype=torch.int64, device=values_CV.device)
    kept_CK = torch.empty(rows, keep, dtype=torch.float32, device=values_CV.device)
    if rows == 0:
        return ids_CK, kept_CK
    tile = next(tile for tile in SELECT_TILES if count <= tile.max_j)
    select_kernel[(rows,)](
        values_CV,
        ids_CK if group_CM is None else group_CM,
        ids_CK,
        kept_CK,
        values_CV.stride(0),
        columns,
        count,
        keep,
        HAS_GROUPS=group_CM is not None,
        GROUP=GROUP,
        BLOCK_J=max(32, triton.next_power_of_2(count)),
        num_warps=warps_for(tile.warps),
        num_stages=1,
    )
    return ids_CK, kept_CK
