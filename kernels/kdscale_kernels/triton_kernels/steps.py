"""The row steps in Triton, for fp32 logits (row_steps.RowSteps says what each does).

Legend: C rows, V vocabulary, K teacher entries or logits kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.triton_kernels.full import full_step
from kdscale_kernels.triton_kernels.slices import TritonSlices
from kdscale_kernels.triton_kernels.sparse import DTYPES, sparse_step
from kdscale_kernels.triton_kernels.topk import topk_step
from kdscale_kernels.types import LossOptions


class TritonRowSteps:
    """Steps that need no array beside the logits."""

    bf16_logits = False
    in_place_dtypes: tuple[torch.dtype, ...] = DTYPES
    sparse = staticmethod(sparse_step)
    full = staticmethod(full_step)

    def sparse_buffers(self, options: LossOptions) -> int:
        """The logits alone."""
        return 1

    def full_buffers(self, vocab: int) -> int:
        """The logits of both models."""
        return 2

    def topk_buffers(self, options: LossOptions) -> int:
        """The logits alone."""
        return 1

    def topk(self, z_CV: Tensor, k: int, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
        """With a soft-cap z_CV is capped in place."""
        return topk_step(z_CV, k, options.temperature, options.softcap)

    def slices(
        self, entries: TeacherEntries, labels_C: Tensor, options: LossOptions, edges: Sequence[int]
    ) -> TritonSlices:
        """Never waits for the device."""
        return TritonSlices(entries, labels_C, options, edges)
