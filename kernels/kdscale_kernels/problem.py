"""A call of linear_sparse_kl as its modes see it.

Legend: N rows, M valid rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdscale_kernels.modes import Layout
from kdscale_kernels.targets import Targets
from kdscale_kernels.types import LossOptions


@dataclass(frozen=True)
class Problem:
    """Everything the op needs that has no gradient."""

    valid_M: Tensor
    labels_M: Tensor
    targets: Targets
    options: LossOptions
    vocab: int
    layout: Layout
    operand: torch.dtype
    accumulate: torch.dtype
    backend: str
    wanted: tuple[bool, ...]  # gradients of hidden, weight, bias
