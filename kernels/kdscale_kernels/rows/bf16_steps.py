"""What a backend does with the bf16 logits that an op makes itself on a CPU (fused/bf16_slices.py, fused/bf16_topk.py).

Legend: C rows, V columns, K entries of a row, M candidates, H hidden size, T temperature.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kdscale_kernels.rows.results import Candidates, TailSums


class Bf16Steps(Protocol):
    """Each step takes contiguous arrays and sums in fp32."""

    leaves_softmaxes: bool  # what `exponentials` writes is divided by its row's sum

    def dots(self, hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor) -> Tensor:
        """hidden · weight[ids] [C,K] in fp32, of bf16 operands."""

    def exponentials(self, z_CV: Tensor, plain_CV: Tensor | None, temperature: float) -> TailSums:
        """The sums of each row of logits; writes exp((z - top) / T) over them and, if given, exp(z - top) to plain_CV.

        For a row of nothing but -inf, top is -inf and the rest may be anything.
        """

    def scale(
        self, first_CV: Tensor, factor_C: Tensor, second_CV: Tensor | None = None, other_C: Tensor | None = None
    ) -> None:
        """first <- first · factor + second · other, of bf16 arrays, rounded once."""

    def candidates(self, z_CV: Tensor, count: int, temperature: float) -> Candidates:
        """The `count` largest of each row, ties as they come. Destroys z_CV.

        A NaN is among the candidates or makes its row's others_C NaN.
        """
