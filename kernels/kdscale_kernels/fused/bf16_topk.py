"""The largest logits of a row and its log-sum-exp from bf16 logits on a CPU: the same entries as from fp32 ones.

Legend: C rows of one chunk, H hidden size, V vocabulary, K entries wanted, M > K candidates, S columns of the sample,
T temperature.

As in bf16_slices.py the product starts from -shift of its row, in its fp32 sums, and only the result is rounded to
bf16: an entry d nats from the shift is off by at most d·2⁻⁸. The shift lies where the tail begins: near the K-th
largest logit, guessed from S columns. M candidates are then computed anew in fp32. The K largest are the
answer if the K-th is above the most that any rounded logit outside may have been; where it may not be (ties, say), the
row is left to fp32 logits. The candidates but the lowest enter the log-sum-exp with their fp32 values, all others
rounded, each by itself, so that the errors of the sum cancel. The lowest candidate is the largest of these others, so
that their sum needs no pass for its maximum and none for the largest probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.types import TopKLse

BF16_CHUNK_BYTES = 24 << 20  # logits of a chunk: the steps after the product find them in a cache
_SAMPLE = 1024  # columns that the shift is guessed from
_FEWEST_COLUMNS = 16 * _SAMPLE
_SLACK = 2.0**-7  # of the distance from the shift; a rounding is at most half of that
_FP32_SLACK = 2.0**-14  # of the shift: sums in two orders


def bf16_candidates_fit(vocab: int, k: int) -> bool:
    """Whether candidates and sample are few beside the vocabulary, so that this way is the faster one."""
    return vocab >= _FEWEST_COLUMNS and 8 * candidates(k) <= vocab


def candidates(k: int) -> int:
    """How many entries are computed again in fp32, for k wanted ones."""
    return k + max(8, k // 4)


def bf16_topk_lse(
    hidden_CH: Tensor, weight_VH: Tensor, k: int, temperature: float, buffer_CV: Tensor, steps: Bf16Steps
) -> tuple[TopKLse, Tensor]:
    """(ids [C,K], fp32 logits and log-sum-exps; True [C] where they are uncertain). Operands and buffer in bf16."""
    shift_C = _guess(hidden_CH, weight_VH)
    z_CV = torch.addmm(-shift_C[:, None], hidden_CH, weight_VH.T, out=buffer_CV)
    found = steps.candidates(z_CV, candidates(k), temperature)
    ids_CM, lowest_C = found.ids_CM.sort(1).values, found.lowest_C
    exact_CM = steps.dots(hidden_CH, weight_VH, ids_CM)
    values_CM, order_CM = torch.sort(exact_CM, dim=1, descending=True, stable=True)
    shift_C = shift_C.float()
    outside_C = lowest_C + lowest_C.abs() * _SLACK + shift_C.abs() * _FP32_SLACK
    certain_C = (values_CM[:, k - 1] - shift_C > outside_C) & ~found.others_C.isnan()  # False for NaN, too
    exact_CM.masked_fill_(ids_CM == found.lowest_id_C[:, None], float("-inf"))
    others_C = lowest_C / temperature + found.others_C.log()
    lse_C = torch.logaddexp((exact_CM / temperature).logsumexp(1), others_C + shift_C / temperature)
    ids_CK = ids_CM.gather(1, order_CM[:, :k])
    return TopKLse(ids_CK, values_CM[:, :k], lse_C), ~certain_C


def _guess(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """A bf16 value [C] near each row's larger logits: the median of the largest of 64 groups of some columns."""
    # from all over the vocabulary: the first ids are often special tokens and bytes, whose logits lie apart
    sample_SH = weight_VH[:: len(weight_VH) // _SAMPLE][:_SAMPLE]
    z_CS = hidden_CH @ sample_SH.T
    return z_CS.unflatten(1, (64, -1)).amax(1).median(1).values
