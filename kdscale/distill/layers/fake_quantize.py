"""Quantisation-aware training: the student computes with the grid points that its weights will be stored as.

Each linear layer's forward takes the grid point nearest to every weight; the gradient goes to the weight itself as if
there were no grid (straight-through estimator, arXiv 1308.3432; for distillation arXiv 2601.20088). Nothing is kept
beside the weights: the backward finds the grid points again. So ZeRO-3, which has a layer's weights whole only around
its forward and its backward, never holds more than one layer's.

O outputs, I inputs, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kdscale.config.distill.optimizer import FakeQuantizeConfig
from kdscale.errors import ConfigError
from kdscale.weights.integer_grid import IntegerGrid


class GridLinear(nn.Linear):
    """A linear layer whose weight takes part as its nearest grid points; see `fake_quantize`."""

    grid: IntegerGrid
    stored: torch.dtype  # the dtype that the weight has in the student's files, which are quantised afterwards

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Linear."""
        out: torch.Tensor = _StraightThrough.apply(input, self.weight, self.bias, self.grid, self.stored)
        return out


class _StraightThrough(torch.autograd.Function):
    """x Q(W)ᵀ + b. The backward takes dQ/dW for the identity."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, grid: IntegerGrid,
        stored: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight_OI)  # the parameter, which ZeRO-3 fills again before the backward
        ctx.grid, ctx.stored = grid, stored
        x_NI, quantised_IO = x.reshape(-1, x.shape[-1]), grid.nearest(weight_OI.detach(), stored).t()
        out_NO = x_NI @ quantised_IO if bias_O is None else torch.addmm(bias_O, x_NI, quantised_IO)
        return out_NO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        (grad,) = gradients
        grad_NO = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            (grad_NO @ ctx.grid.nearest(weight_OI.detach(), ctx.stored)).view(x.shape) if of_x else None,
            grad_NO.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            grad_NO.sum(0) if of_bias else None,
            None,
            None,
        )


def fake_quantize(model: Any, settings: FakeQuantizeConfig, stored: Mapping[str, torch.dtype]) -> None:
    """Let the linear layers of a transformers model with these weights compute with the grid of `settings`.

    `stored`: the dtype of each of the weights in the student's files. Parameters, their names and what is saved of them
    stay as they are. Raises ConfigError for a layer whose inputs the group does not divide.
    """
    grid, modules = IntegerGrid(settings.bits, settings.group), dict(model.named_modules())
    for weight, dtype in stored.items():
        name = weight.removesuffix(".weight")
        module = modules[name]
        if type(module) is not nn.Linear or not grid.divides(module.in_features):
            raise ConfigError(
                "distill.fake_quantize",
                expected=f"linear layers whose inputs are a multiple of group ({settings.group})",
                got=f"{name}: {module}",
                hint="choose a group that divides the inputs, or cut the student to another width",
            )
        on_grid: Any = module
        on_grid.__class__ = GridLinear
        on_grid.grid, on_grid.stored = grid, dtype
