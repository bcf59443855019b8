"""The steps on bf16 logits that ops make themselves on a CPU (row_steps.Bf16Steps), in torch.

Legend: C rows, B rows at once in cache, V columns, H hidden size, K entries of a row, M candidates, T temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdscale_kernels.rows.results import Candidates, TailSums
from kdscale_kernels.rows.torch_topk import largest

# One fp32 array of the steps on a few rows: it stays in a cache, and is enough work for all threads to be worth waking
# (256 KiB: 1.7 times the wall time on two threads).
_CACHED_BYTES = 2 << 20


class TorchBf16Steps:
    """A few rows at a time as fp32. For the calls of one op: its memory is kept from call to call."""

    leaves_softmaxes = True

    def __init__(self) -> None:
        self._scratch = [torch.empty(0, dtype=torch.float32) for _ in range(2)]

    def dots(self, hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor) -> Tensor:
        """See Bf16Steps.dots."""
        (rows, entries), hidden = ids_CK.shape, hidden_CH.shape[1]
        step_k = max(1, min(entries, _CACHED_BYTES // (4 * hidden)))
        step = max(1, _CACHED_BYTES // (4 * hidden * step_k))
        out_CK = hidden_CH.new_empty((rows, entries), dtype=torch.float32)
        for row in range(0, rows, step):
            hidden_B1H = hidden_CH[row : row + step, None].float()
            for first in range(0, entries, step_k):
                ids_BK = ids_CK[row : row + step, first : first + step_k]
                head_BKH = self._array(0, (*ids_BK.shape, hidden))
                head_BKH.copy_(weight_VH.index_select(0, ids_BK.flatten()).view_as(head_BKH))
                torch.sum(head_BKH.mul_(hidden_B1H), 2, out=out_CK[row : row + step, first : first + step_k])
        return out_CK

    def exponentials(self, z_CV: Tensor, plain_CV: Tensor | None, temperature: float) -> TailSums:
        """See Bf16Steps.exponentials. A softmax costs less than exp alone, whose kernel is slower."""
        sums = TailSums(*z_CV.new_empty((3, len(z_CV)), dtype=torch.float32).unbind())
        for block, z_BV in self._blocks(z_CV):
            torch.amax(z_BV.copy_(z_CV[block]), 1, out=sums.top_C[block])
            if temperature != 1.0:
                soft_BV = self._array(1, z_BV.shape)
                _softmax_and_sum(z_BV, soft_BV, sums.plain_C[block])
                if plain_CV is not None:
                    plain_CV[block] = soft_BV
                z_BV.div_(temperature)
            _softmax_and_sum(z_BV, z_BV, sums.tempered_C[block])
            z_CV[block] = z_BV
        if temperature == 1.0:
            sums.plain_C.copy_(sums.tempered_C)
        return sums

    def scale(
        self, first_CV: Tensor, factor_C: Tensor, second_CV: Tensor | None = None, other_C: Tensor | None = None
    ) -> None:
        """See Bf16Steps.scale."""
        for block, sum_BV in self._blocks(first_CV):
            sum_BV.copy_(first_CV[block]).mul_(factor_C[block, None])
            if second_CV is not None and other_C is not None:
                second_BV = self._array(1, sum_BV.shape).copy_(second_CV[block])
                sum_BV.addcmul_(second_BV, other_C[block, None])
            first_CV[block] = sum_BV

    def candidates(self, z_CV: Tensor, count: int, temperature: float) -> Candidates:
        """See Bf16Steps.candidates. The others' sum is one over the lowest candidate's probability among them."""
        ids_CM = largest(z_CV, count)
        lowest_C1, place_C1 = z_CV.gather(1, ids_CM).min(1, keepdim=True)
        lowest_id_C1 = ids_CM.gather(1, place_C1)
        row_C1 = torch.arange(len(z_CV))[:, None] * z_CV.shape[1]
        flat = z_CV.view(-1)  # scatter_ would take as long as a pass or two
        flat[(ids_CM + row_C1).flatten()] = float("-inf")
        flat[(lowest_id_C1 + row_C1).flatten()] = lowest_C1[:, 0]
        probability_C1 = torch.empty(len(z_CV), 1, dtype=torch.float32)
        for block, z_BV in self._blocks(z_CV):
            z_BV.copy_(z_CV[block])
            if temperature != 1.0:
                z_BV.div_(temperature)
            torch.softmax(z_BV, 1, out=z_BV)
            torch.gather(z_BV, 1, lowest_id_C1[block], out=probability_C1[block])
        return Candidates(ids_CM, lowest_id_C1[:, 0], lowest_C1[:, 0].float(), probability_C1[:, 0].reciprocal_())

    def _array(self, which: int, shape: tuple[int, ...]) -> Tensor:
        """An fp32 array in the memory kept under this number."""
        size = torch.Size(shape).numel()
        if self._scratch[which].numel() < size:
            self._scratch[which] = torch.empty(size, dtype=torch.float32)
        return self._scratch[which][:size].view(shape)

    def _blocks(self, z_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (some of the rows, an fp32 array [B,V] for them)."""
        rows, columns = z_CV.shape
        step = max(1, _CACHED_BYTES // (4 * columns))
        for begin in range(0, rows, step):
            block = slice(begin, min(begin + step, rows))
            yield block, self._array(0, (block.stop - begin, columns))


def _softmax_and_sum(z_BV: Tensor, out_BV: Tensor, sum_B: Tensor) -> None:
    """Write softmax(z) to out_BV (or z_BV), and to sum_B the sum of exp(z - max): one over the largest probability."""
    torch.softmax(z_BV, 1, out=out_BV)
    torch.amax(out_BV, 1, out=sum_B)
    sum_B.reciprocal_()
