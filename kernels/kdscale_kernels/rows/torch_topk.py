"""The largest logits of each row, and its log-sum-exp, in torch.

Legend: C rows, V columns, K values wanted, G groups of E columns (GROUP), J entries searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.rows.torch_sparse import cap_
from kdscale_kernels.types import LossOptions

_KEY_PARTS = 8  # keys take twice a value's memory: an eighth of the rows at a time
GROUP = 8  # columns; docs/explanation/kernels.md has what 4 to 64 take


def topk_step(z_CV: Tensor, k: int, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [C,k], logits [C,k], logsumexp(z / T) [C]) of raw logits, which are destroyed; ties as in topk_rows."""
    if options.softcap is not None:
        cap_(z_CV, options.softcap)
    ids_CK, values_CK = topk_rows(z_CV, k)
    top_C = values_CK[:, 0]
    shift_C = top_C.masked_fill(top_C == float("-inf"), 0.0)  # a shard's row may be nothing but -inf
    z_CV.sub_(shift_C[:, None]).div_(options.temperature).exp_()
    return ids_CK, values_CK, top_C / options.temperature + z_CV.sum(1).log()


def topk_rows(z_CV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) [C,k] of the k largest a row; equal values come in order of id, NaN first.

    One entry more than asked for is searched: only where it equals the last one kept can the library's choice among
    equals matter, and those rows are sorted in full.
    """
    if k == z_CV.shape[1]:
        values_CK, ids_CK = torch.sort(z_CV, dim=1, descending=True, stable=True)
        return ids_CK, values_CK
    if z_CV.device.type != "cpu" and z_CV.dtype == torch.float32:
        parts = [_topk_by_keys(z_PV, k) for z_PV in z_CV.split(max(1, z_CV.shape[0] // _KEY_PARTS))]
        ids_CK = torch.cat(parts)
        return ids_CK, z_CV.gather(1, ids_CK)
    ids_CM = largest(z_CV, k + 1).sort(1).values
    values_CM, order_CM = torch.sort(z_CV.gather(1, ids_CM), dim=1, descending=True, stable=True)
    last_C, next_C = values_CM[:, k - 1], values_CM[:, k]
    ids_CK, values_CK = ids_CM.gather(1, order_CM[:, :k]), values_CM[:, :k]
    tied = ((last_C == next_C) | next_C.isnan()).nonzero()[:, 0]
    if tied.numel():
        values_TV, ids_TV = torch.sort(z_CV[tied], dim=1, descending=True, stable=True)
        ids_CK[tied], values_CK[tied] = ids_TV[:, :k], values_TV[:, :k]
    return ids_CK, values_CK


def _topk_by_keys(z_PV: Tensor, k: int) -> Tensor:
    """The ids of topk_rows in their order, by whole numbers without ties: nobody has to look for ties and wait for it.

    A key has the value above and the id below: fp32 bits, with those of negative values turned round, are in the order
    of the values. -0 counts as 0, and NaN of any sign as the largest.
    """
    bits_PV = torch.where(z_PV.isnan(), torch.nan, z_PV + 0.0).view(torch.int32).long()
    bits_PV = torch.where(bits_PV < 0, bits_PV ^ 0x7FFFFFFF, bits_PV)
    below_V = torch.arange(z_PV.shape[1] - 1, -1, -1, device=z_PV.device)
    keys_PK = ((bits_PV << 31) + below_V).topk(k, dim=1, sorted=True).values
    return z_PV.shape[1] - 1 - (keys_PK & 0x7FFFFFFF)


def largest(z_CV: Tensor, count: int) -> Tensor:
    """Ids [C,count] of the largest values of a row in any order, ties as they come.

    The `count` groups of columns with the largest maxima hold them: a value outside has `count` that are no smaller,
    one in each. So only what is in those groups (and the columns left over) is searched. The groups are found among
    their maxima in the same way, so that beside one pass over the row everything is small. A group's columns lie V/E
    apart, so that the maxima are those of whole rows of columns.
    """
    vocab = z_CV.shape[1]
    if vocab < 4 * count * GROUP:
        return z_CV.topk(count, dim=1, sorted=False).indices
    groups = vocab // GROUP
    grouped_CEG = z_CV[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    group_CM = largest(grouped_CEG.amax(1), count)
    searched_CJ = grouped_CEG.gather(2, group_CM[:, None].expand(-1, GROUP, -1)).flatten(1)
    if groups * GROUP < vocab:
        searched_CJ = torch.cat([searched_CJ, z_CV[:, groups * GROUP :]], 1)
    best_CM = searched_CJ.topk(count, dim=1, sorted=False).indices
    row_CM, place_CM = best_CM // count, best_CM % count
    ids_CM = row_CM * groups + group_CM.gather(1, place_CM)
    return torch.where(best_CM < GROUP * count, ids_CM, best_CM - GROUP * count + groups * GROUP)
