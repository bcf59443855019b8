"""The autograd function of every fused loss: gradients are made in the forward pass, and backward only scales them.

So the product hidden · weightᵀ is computed once (the idea of Liger-Kernel's fused linear losses, Hsu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Made(NamedTuple):
    """What a loss's forward leaves: sums over the rows, the loss first, and the loss's gradients."""

    sums: Sequence[Tensor]
    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def made_in_forward(
    op: str, run: Callable[[], Made], hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, ...]:
    """run()'s sums; the first is differentiable once with respect to the three inputs. Autocast is off within."""
    outputs: tuple[Tensor, ...] = _MadeInForward.apply(hidden_NH, weight_VH, bias_V, op, run)
    return outputs


class _MadeInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, op: str, run: Callable[[], Made]
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            made = run()
        ctx.op = op
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(made.hidden_NH, made.weight_VH, made.bias_V)
        ctx.mark_non_differentiable(*made.sums[1:])
        ctx.set_materialize_grads(False)
        return tuple(made.sums)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.op)
        if grad_outputs[0] is None:
            return (None,) * 5
        scaled = [scale(g, grad_outputs[0], d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


def scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient · factor, rounded once, to dtype, without a second full-precision copy; on a CPU itself times one."""
    if gradient is None:
        return None
    # read on a CPU alone: on a device it would wait
    if gradient.device.type == "cpu" and gradient.dtype == dtype and float(factor) == 1.0:
        return gradient
    return torch.mul(gradient, factor.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))


def refuse_double_backward(op: str) -> None:
    """The gradient is a constant by the time backward runs: differentiating it again would silently give zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} can be differentiated once only (its gradient is made in the forward pass): "
            "call backward without create_graph=True, or use kdscale_kernels.reference"
        )
