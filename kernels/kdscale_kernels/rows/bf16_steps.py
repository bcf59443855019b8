"""What a backend does with the bf16 logits that an op makes itself on a CPU (fused/bf16_slices.py, fused/bf16_topk.py).

Legend: C rows, V columns, K entries of a row, M candidates, H hidden size, T temperature.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from kdscale_kernels.rows.results import Candidates, TailSums


class Bf16Steps(Protocol):
    """Each step takes contiguous arrays and sums in fp32."""

    leaves_softmaxes: bool  # of `exponentials`: exp(z / T) over its row's sum, not over that of the largest logit

    def dots(self, hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor) -> Tensor:
        """hidden · weight[ids] [C,K] in fp32, of bf16 operands."""

    def exponentials(self, z_CV: Tensor, plain_CV: Tensor | None, temperature: float) -> TailSums:
        """The sums of a row of bf16 logits; exp((z - top) / T) in their place and, with plain_CV, exp(z - top) there.

        With leaves_softmaxes both are divided by their row's sum. A row of nothing but -inf has top -inf, and anything
        else.
        """

    def scale(
        self, first_CV: Tensor, factor_C: Tensor, second_CV: Tensor | None = None, other_C: Tensor | None = None
    ) -> None:
        """first <- first · factor + second · other, of bf16 arrays, rounded once."""

    def candidates(self, z_CV: Tensor, count: int, temperature: float) -> Candidates:
        """The `count` largest of each row, ties as they come. Destroys z_CV. A NaN makes its row's others_C NaN.

        Unless it is among the candidates itself.
        """
