"""The row steps in torch, for any device (row_steps.RowSteps says what each does)."""

from __future__ import annotations

import torch

from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.rows.torch_bf16 import TorchBf16Steps
from kdscale_kernels.rows.torch_full import full_buffers, full_step
from kdscale_kernels.rows.torch_slices import TorchSlices
from kdscale_kernels.rows.torch_sparse import sparse_step
from kdscale_kernels.rows.torch_topk import topk_step
from kdscale_kernels.types import LossOptions


class TorchRowSteps:
    """Steps on fp32 or fp64 logits, contiguous."""

    in_place_dtypes: tuple[torch.dtype, ...] = ()
    sparse = staticmethod(sparse_step)
    full = staticmethod(full_step)
    topk = staticmethod(topk_step)
    slices = TorchSlices

    def __init__(self) -> None:
        self.bf16_steps: Bf16Steps = TorchBf16Steps()

    def sparse_buffers(self, options: LossOptions) -> int:
        """The logits, a second softmax when T != 1, the soft-cap's slope."""
        return 1 + (options.temperature != 1.0) + (options.softcap is not None)

    def full_buffers(self, vocab: int) -> int:
        """The logits of both models and some blocks of columns."""
        return full_buffers(vocab)

    def topk_buffers(self, options: LossOptions) -> int:
        """The logits and the soft-cap's slope."""
        return 1 + (options.softcap is not None)
