"""How the ops meet autograd, torch.func and torch.compile.

The gradients of a loss are made in the forward pass, and backward only scales them, so that the product hidden ·
weightᵀ is computed once (the idea of Liger-Kernel's fused linear losses, Hsu et al. 2024). torch.func can keep nothing
but outputs for backward: there the gradients are outputs beside the sums, and differentiating one is an error.
Elsewhere they are kept aside: .grad takes over the memory of a kept tensor; an output it would have to copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
COMPILE_MESSAGE = (
    "the ops of kdscale_kernels count rows and choose chunks from data, so torch.compile cannot trace them: "
    "without fullgraph=True it leaves them as they are and compiles what lies around them"
)


class ForwardResult(NamedTuple):
    """What the forward pass of a loss returns: sums over the rows, the loss first, and the gradients of the loss."""

    sums: Sequence[Tensor]
    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def runs_eagerly(op: Callable[P, R]) -> Callable[P, R]:
    """An op that torch.compile does not look into (it names COMPILE_MESSAGE) and that refuses torch.func.vmap."""
    untraced: list[Callable[P, R]] = []

    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(_is_batched(value) for value in (*args, *kwargs.values())):
            raise refusal(op.__name__, "does not work under torch.func.vmap or hessian")
        return op(*args, **kwargs)

    @wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # which torch.compiler would load now, and nobody compiles
            return checked(*args, **kwargs)
        if not untraced:
            untraced.append(torch.compiler.disable(checked))
        return untraced[0](*args, **kwargs)

    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, COMPILE_MESSAGE  # type: ignore[attr-defined]
    return call


def _is_batched(value: object) -> bool:
    """Whether a transform of torch.func has added a batch dimension, at any level."""
    functorch = torch._C._functorch
    while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def in_torch_func() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, ...) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refusal(op: str, why: str) -> RuntimeError:
    """The error for a transform that an op cannot take."""
    return RuntimeError(
        f"{op} {why} (its gradient is made in the forward pass, for all rows at once): "
        "take first derivatives with backward, torch.func.grad or torch.func.vjp, or use kdscale_kernels.reference"
    )


def wants_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which of a loss's inputs need a gradient."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def with_forward_gradients(
    op: str,
    run: Callable[[Tensor, Tensor, Tensor | None, Any], ForwardResult],
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    call: Any,
) -> tuple[Tensor, ...]:
    """The sums of run(hidden_NH, weight_VH, bias_V, call); the first is differentiable once by the three tensors.

    call: a NamedTuple, so that torch.func finds the tensors in it. Autocast is off while it runs.
    """
    outputs = _ForwardGradients.apply(hidden_NH, weight_VH, bias_V, op, run, call, kept_gradients())
    return tuple(outputs[:-_GRADIENTS])


_GRADIENTS = 3  # the last outputs: of hidden, weight and bias, or None


class OnceDifferentiable(torch.autograd.Function):
    """An autograd function whose gradients are made in forward; what it cannot be transformed by, it refuses.

    setup_context sets ctx.op, the op's name, and ctx.in_func, whether it was called in torch.func.
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """Refuse, where only what a loss is differentiable by has a batch dimension."""
        raise refusal("this op", "does not work under torch.func.vmap or hessian")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse forward-mode derivatives."""
        raise refusal(ctx.op, "has no forward-mode derivative")


class _ForwardGradients(OnceDifferentiable):
    @staticmethod
    def forward(
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        op: str,
        run: Callable[[Tensor, Tensor, Tensor | None, Any], ForwardResult],
        call: Any,
        kept: list[Tensor | None] | None,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            sums, *gradients = run(hidden_NH, weight_VH, bias_V, call)
        return (*sums, *keep(gradients, kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.op, _, _, kept = inputs
        ctx.in_func = kept is None
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*(output[-_GRADIENTS:] if kept is None else kept))
        ctx.mark_non_differentiable(*output[1:-_GRADIENTS])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx, grad_outputs[-_GRADIENTS:])
        if grad_outputs[0] is None:
            return (None,) * 7
        scaled = [scale(g, grad_outputs[0], d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (*scaled, None, None, None, None)


def kept_gradients() -> list[Tensor | None] | None:
    """Where a forward pass leaves its gradients for setup_context; None in torch.func, where they are outputs."""
    return None if in_torch_func() else []


def keep(gradients: Sequence[Tensor | None], kept: list[Tensor | None] | None) -> Sequence[Tensor | None]:
    """The outputs that stand for the gradients: None for each that is kept aside."""
    if kept is None:
        return gradients
    kept.extend(gradients)
    return [None] * len(gradients)


def scale(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient · factor, rounded once, to dtype, without a second full-precision copy; on a CPU no copy for 1."""
    if gradient is None:
        return None
    if torch.is_grad_enabled():  # only in torch.func, which must see that the result hangs on the gradient
        return (gradient * factor.to(gradient.dtype)).to(dtype)
    # the factor is read on a CPU only: elsewhere that would wait for the device
    if gradient.device.type == "cpu" and gradient.dtype == dtype and float(factor) == 1.0:
        return gradient
    return torch.mul(gradient, factor.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))


def refuse_double_backward(ctx: Any, of_gradients: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError where a gradient is differentiated again: it is a constant, which would silently give zero.

    torch.func always asks for a graph; there the error comes when something arrives at the gradients (of_gradients).
    """
    if any(g is not None for g in of_gradients) or (torch.is_grad_enabled() and not ctx.in_func):
        raise refusal(ctx.op, "can be differentiated once only")
