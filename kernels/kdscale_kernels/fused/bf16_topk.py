"""The largest logits of a row and its log-sum-exp from bf16 logits on a CPU: the same entries as from fp32 ones.

Legend: C rows of one chunk, B rows at once in cache, H hidden size, V vocabulary, K entries wanted, M > K candidates,
S columns of the sample, T temperature.

As in bf16_slices.py the product starts from -shift of its row, in its fp32 sums, and only the result is rounded to
bf16: an entry d nats from the shift is off by at most d·2⁻⁸. The shift lies where the tail begins: near the K-th
largest logit, guessed from the first S columns. M candidates are then computed anew in fp32. The K largest are the
answer if the K-th is above the most that any rounded logit outside may have been; where it may not be (ties, say), the
row is left to fp32 logits. The candidates enter the log-sum-exp with their fp32 values, all others rounded, each by
itself, so that the errors of the sum cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale_kernels.fused.bf16_slices import CACHED_BYTES, exact_logits, softmax_and_sum
from kdscale_kernels.rows.torch_topk import largest
from kdscale_kernels.types import TopKLse

BF16_CHUNK_BYTES = 24 << 20  # logits of a chunk: the steps after the product find them in a cache
_SAMPLE = 4096  # columns that the shift is guessed from
_SLACK = 2.0**-7  # of the distance from the shift; a rounding is at most half of that
_FP32_SLACK = 2.0**-14  # of the shift: sums in two orders


def bf16_candidates_fit(vocab: int, k: int) -> bool:
    """Whether candidates and sample are few beside the vocabulary, so that this way is the faster one."""
    return vocab >= 4 * _SAMPLE and 8 * candidates(k) <= vocab


def candidates(k: int) -> int:
    """How many entries are computed again in fp32, for k wanted ones."""
    return k + max(8, k // 4)


def bf16_topk_lse(
    hidden_CH: Tensor, weight_VH: Tensor, k: int, temperature: float, buffer_CV: Tensor
) -> tuple[TopKLse, Tensor]:
    """(ids [C,K], fp32 logits and log-sum-exps; True [C] where they are uncertain). Operands and buffer in bf16."""
    shift_C = _guess(hidden_CH, weight_VH)
    z_CV = torch.addmm(-shift_C[:, None], hidden_CH, weight_VH.T, out=buffer_CV)
    ids_CM = largest(z_CV, candidates(k)).sort(1).values
    lowest_C = z_CV.gather(1, ids_CM).amin(1).float()
    exact_CM = exact_logits(hidden_CH, weight_VH, ids_CM)
    values_CM, order_CM = torch.sort(exact_CM, dim=1, descending=True, stable=True)
    shift_C = shift_C.float()
    outside_C = lowest_C + lowest_C.abs() * _SLACK + shift_C.abs() * _FP32_SLACK
    certain_C = values_CM[:, k - 1] - shift_C > outside_C  # False for NaN, too
    row_C = torch.arange(len(z_CV))[:, None] * z_CV.shape[1]
    z_CV.view(-1)[(ids_CM + row_C).flatten()] = float("-inf")
    tail_C = _log_sum_exp(z_CV, temperature) + shift_C / temperature
    lse_C = torch.logaddexp((values_CM / temperature).logsumexp(1), tail_C)
    ids_CK = ids_CM.gather(1, order_CM[:, :k])
    return TopKLse(ids_CK, values_CM[:, :k], lse_C), ~certain_C


def _guess(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """A bf16 value [C] near each row's larger logits: the median of the largest of 64 groups of the first columns."""
    z_CS = hidden_CH @ weight_VH[:_SAMPLE].T
    return z_CS.unflatten(1, (64, -1)).amax(1).median(1).values


def _log_sum_exp(z_CV: Tensor, temperature: float) -> Tensor:
    """log Σ exp(z / T) of each row, in fp32, some rows at a time."""
    rows, vocab = z_CV.shape
    step = max(1, CACHED_BYTES // (4 * vocab))
    scratch = torch.empty(2, min(step, rows), vocab, dtype=torch.float32)
    top_C, sum_C = torch.empty(2, rows, dtype=torch.float32)
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        z_BV, soft_BV = scratch[:, : block.stop - begin]
        z_BV.copy_(z_CV[block])
        if temperature != 1.0:
            z_BV.div_(temperature)
        torch.amax(z_BV, 1, out=top_C[block])
        softmax_and_sum(z_BV, soft_BV, sum_C[block])
    return sum_C.log_().add_(top_C)
