"""The autograd function of every fused loss: gradients are made in the forward pass, and backward only scales them.

So the product hidden · weightᵀ is computed once (the idea of Liger-Kernel's fused linear losses, Hsu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ForwardResult(NamedTuple):
    """What the forward pass of a loss returns: sums over the rows, the loss first, and the gradients of the loss."""

    sums: Sequence[Tensor]
    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def wants_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of a loss's inputs need a gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def with_forward_gradients(
    op: str, run: Callable[[], ForwardResult], hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the sums of run(); the first is differentiable once by the three inputs. Autocast is off while it runs."""
    outputs: tuple[Tensor, ...] = _ForwardGradients.apply(hidden_NH, weight_VH, bias_V, op, run)
    return outputs


class _ForwardGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, op: str, run: Callable[[], ForwardResult]
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            result = run()
        ctx.op = op
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.save_for_backward(result.hidden_NH, result.weight_VH, result.bias_V)
        ctx.mark_non_differentiable(*result.sums[1:])
        ctx.set_materialize_grads(False)
        return tuple(result.sums)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.op)
        if grad_outputs[0] is None:
            return (None,) * 5
        scaled = [scale(g, grad_outputs[0], d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None, None)


def scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient · factor, rounded once, to dtype, without a second full-precision copy; on a CPU no copy for 1."""
    if gradient is None:
        return None
    # the factor is read on a CPU only: elsewhere that would wait for the device
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
