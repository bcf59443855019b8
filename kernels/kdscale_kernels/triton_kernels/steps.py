"""The row steps in Triton (row_steps.RowSteps says what each does)."""

from __future__ import annotations

import torch

from kdscale_kernels.triton_kernels.full import full_step
from kdscale_kernels.triton_kernels.slices import TritonSlices
from kdscale_kernels.triton_kernels.sparse import DTYPES, sparse_step
from kdscale_kernels.triton_kernels.topk import topk_step
from kdscale_kernels.types import LossOptions


class TritonRowSteps:
    """Steps on fp32 logits that need no array beside them; `sparse` takes bf16 logits too."""

    bf16_steps = None
    in_place_dtypes: tuple[torch.dtype, ...] = DTYPES
    sparse = staticmethod(sparse_step)
    full = staticmethod(full_step)
    topk = staticmethod(topk_step)
    slices = TritonSlices

    def sparse_buffers(self, options: LossOptions) -> int:
        """The logits."""
        return 1

    def full_buffers(self, vocab: int) -> int:
        """The logits of both models."""
        return 2

    def topk_buffers(self, options: LossOptions) -> int:
        """The logits."""
        return 1
