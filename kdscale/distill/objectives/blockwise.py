"""Losses that are summed over blocks, with gradients made in the forward pass: no block's intermediates are kept.

The kernels do so for the head (kdscale_kernels/fused/autograd.py): the backward only scales what the forward made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}


def block_values(device: torch.device) -> int:
    """How many values the largest array of a block should have on this device: 4 MiB on a CPU, 64 MiB on a GPU."""
    return _VALUES.get(device.type, _VALUES["cuda"])


def _wide_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def wide(value: Tensor) -> Tensor:
    """The values in fp32, or in fp64 as they are."""
    return value.to(_wide_dtype(value))


@dataclass(frozen=True)
class Block:
    """Part of a sum: `sums` of the `parts`, which are (number of an input, index into it); the first sum is the loss.

    `sums` gets each part in fp32 at least and returns a vector; only the first is differentiated.
    """

    parts: Sequence[tuple[int, Any]]
    sums: Callable[..., Tensor]


def sum_blocks(inputs: Sequence[Tensor], blocks: Iterable[Block]) -> tuple[Tensor, Tensor]:
    """(loss, all sums detached) over all blocks, of which there is at least one; differentiable once by `inputs`."""
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in inputs)
    gradients = [torch.zeros_like(value, dtype=_wide_dtype(value)) for value in inputs] if wanted else []
    totals: Any = 0.0
    for block in blocks:
        parts = [wide(inputs[number].detach()[index]).requires_grad_(wanted) for number, index in block.parts]
        with torch.set_grad_enabled(wanted):
            sums = block.sums(*parts)
        totals = totals + sums.detach()
        if wanted:
            made = torch.autograd.grad(sums[0], parts)
            for (number, index), gradient in zip(block.parts, made, strict=True):
                gradients[number][index] += gradient
    if not wanted:
        return totals[0], totals
    cast = [gradient.to(value.dtype) for gradient, value in zip(gradients, inputs, strict=True)]
    return _MadeInForward.apply(totals[0], cast, *inputs), totals


class _MadeInForward(torch.autograd.Function):
    """A value with gradients that exist already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(gradient * outer.to(gradient.dtype) for gradient in ctx.saved_tensors)
