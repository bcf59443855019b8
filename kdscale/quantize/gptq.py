"""GPTQ (Frantar et al., arXiv 2210.17323): what rounding one input loses, the inputs yet to be rounded make up for.

The error of a linear map over the calibration tokens is tr(D G Dᵀ), with D what rounding changes in its weight and
G = Σ xᵀx of what it reads. Inputs are rounded one after another; each time the others move by the step that makes up
best, which follows from the rows of a Cholesky factor of G⁻¹. Scales are chosen before (they stay in the order of
the inputs, whatever the order of rounding), each with the smallest error weighted by the diagonal of G.

An output whose error is smaller with plain rounding gets that: each output stands alone, so none is worse than rounded.

O outputs · I inputs · G groups · b inputs of a block
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdscale.errors import SelfCheckError
from kdscale.quantize.forms import Quantized
from kdscale.quantize.integers import rounded
from kdscale.weights.integer_grid import IntegerGrid

# Shares of the range that are tried for a scale: a narrower range cuts off the largest values and rounds the others
# better.
_SHARES = [1.0 - 0.02 * step for step in range(26)]
_BLOCK = 128  # inputs whose steps reach the others in one product


class Solution(NamedTuple):
    """A weight in few bits, and Σ of squared output errors over the calibration tokens: its own, and plain rounding's.

    Outputs are as they are, not per token; only the ratio means something without the number of tokens.
    """

    quantized: Quantized
    error: float
    rounding_error: float


def gptq(weight_OI: Tensor, gram_II: Tensor, grid: IntegerGrid, damping: float, act_order: bool, what: str) -> Solution:
    """Quantise a weight whose inputs have the Gram matrix `gram_II` (fp32; left as it is). fp32, factors in fp64.

    `damping` is added to the diagonal, as a share of its mean. Raises SelfCheckError, naming `what`, when the sums are
    not finite.
    """
    plain = rounded(weight_OI, grid.scales(weight_OI), grid)
    diagonal_I = gram_II.diagonal()
    if not bool(torch.isfinite(diagonal_I).all()):
        raise SelfCheckError(
            f"the inputs of {what} are not finite on the calibration text",
            hint="set quantize.dtype=float32, or check the student's weights",
        )
    if float(diagonal_I.sum()) == 0.0:  # nothing ever reached it: nothing is known of what to make up
        return Solution(plain, 0.0, 0.0)
    order_I = torch.argsort(diagonal_I, descending=True, stable=True) if act_order else None
    factor_II = _inverse_factor(gram_II, damping, order_I, what)
    scales_OG = fitted_scales(weight_OI, diagonal_I, grid)
    made = _rounded_in_turn(weight_OI, factor_II, grid, scales_OG, order_I)
    error_O, plain_O = (_errors(weight_OI, candidate, gram_II) for candidate in (made, plain))
    worse_O1 = (error_O > plain_O)[:, None]
    quantized = Quantized(
        torch.where(worse_O1, plain.codes_OI, made.codes_OI), torch.where(worse_O1, plain.scales_OG, made.scales_OG)
    )
    return Solution(quantized, float(torch.minimum(error_O, plain_O).sum()), float(plain_O.sum()))


def fitted_scales(weight_OI: Tensor, importance_I: Tensor, grid: IntegerGrid) -> Tensor:
    """[O, G]: of some shares of the grid's own scales, those with the smallest Σ importance · (rounding error)².

    Importance is of inputs, such as the mean square of what they carry.
    """
    full_OG = grid.scales(weight_OI)
    best_OG, least_OG = full_OG, torch.full_like(full_OG, torch.inf, dtype=torch.float32)
    for share in _SHARES:
        scales_OG = grid.usable((full_OG.float() * share).to(full_OG.dtype))
        change_OI = rounded(weight_OI, scales_OG, grid).values().float() - weight_OI.float()
        error_OG = (change_OI.square_() * importance_I.float()).view(*full_OG.shape, -1).sum(-1)
        better_OG = error_OG < least_OG
        best_OG = torch.where(better_OG, scales_OG, best_OG)
        least_OG = torch.where(better_OG, error_OG, least_OG)
    return best_OG


def _inverse_factor(gram_II: Tensor, damping: float, order_I: Tensor | None, what: str) -> Tensor:
    """The upper Cholesky factor of (G + λI)⁻¹, fp32, in the order of rounding. An input that was never there has λ."""
    damped_II = gram_II.double() if order_I is None else gram_II[order_I][:, order_I].double()
    damped_II.diagonal().add_(damping * damped_II.diagonal().mean())
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if not int(failed):
        upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not int(failed):
            return upper_II.float()
    raise SelfCheckError(
        f"the Gram matrix of what {what} reads cannot be inverted",
        expected="a positive definite matrix",
        hint="raise damping of this form, or set quantize.dtype=float32",
    )


def _rounded_in_turn(
    weight_OI: Tensor, factor_II: Tensor, grid: IntegerGrid, scales_OG: Tensor, order_I: Tensor | None
) -> Quantized:
    """Round input after input in this order (None: as they are stored), each time moving those that follow."""
    outputs, inputs = weight_OI.shape
    each_OI = scales_OG.repeat_interleave(inputs // scales_OG.shape[1], dim=1)
    left_IO = weight_OI.float().T.contiguous()  # an input is a row: it is read and written in one piece
    scales_IO = each_OI.T.contiguous()
    least_IO = grid.least_with(scales_OG).repeat_interleave(inputs // scales_OG.shape[1], dim=1).T.contiguous()
    if order_I is not None:
        left_IO, scales_IO, least_IO = left_IO[order_I], scales_IO[order_I], least_IO[order_I]
    codes_IO = torch.empty(inputs, outputs, dtype=torch.int8, device=weight_OI.device)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        steps_bO = left_IO.new_empty(end - begin, outputs)
        for at in range(begin, end):
            row_O, scale_O = left_IO[at], scales_IO[at]
            code_O = (row_O / scale_O.float()).round_().clamp_(min=least_IO[at]).clamp_(max=grid.most)
            codes_IO[at] = code_O.to(torch.int8)
            value_O = (code_O.to(scale_O.dtype) * scale_O).float()  # as readers of the format compute it
            step_O = (row_O - value_O) / factor_II[at, at]
            left_IO[at:end].addr_(factor_II[at, at:end], step_O, alpha=-1)
            steps_bO[at - begin] = step_O
        left_IO[end:].addmm_(factor_II[begin:end, end:].T, steps_bO, alpha=-1)
    if order_I is not None:
        codes_IO = codes_IO[torch.argsort(order_I)]
    return Quantized(codes_IO.T.contiguous(), scales_OG)


def _errors(weight_OI: Tensor, quantized: Quantized, gram_II: Tensor) -> Tensor:
    """Each output's Σ of squared errors over the calibration tokens: the diagonal of D G Dᵀ, [O]."""
    change_OI = weight_OI.float() - quantized.values().float()
    return ((change_OI @ gram_II) * change_OI).sum(1).clamp_min(0)
