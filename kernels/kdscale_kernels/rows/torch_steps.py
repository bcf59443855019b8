"""The row steps in torch, for any device (row_steps.RowSteps says what each does).

Legend: C rows, V vocabulary, K teacher entries or logits kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.rows.torch_full import full_buffers, full_step
from kdscale_kernels.rows.torch_slices import TorchSlices
from kdscale_kernels.rows.torch_sparse import sparse_step
from kdscale_kernels.rows.torch_topk import topk_step
from kdscale_kernels.types import LossOptions


class TorchRowSteps:
    """Steps on fp32 or fp64 logits, contiguous."""

    bf16_logits = True
    in_place_dtypes: tuple[torch.dtype, ...] = ()

    def sparse_buffers(self, options: LossOptions) -> int:
        """The logits, a second softmax when T != 1, the soft-cap's slope."""
        return 1 + (options.temperature != 1.0) + (options.softcap is not None)

    def full_buffers(self, vocab: int) -> int:
        """The logits of both models, and at most twelve blocks of columns."""
        return full_buffers(vocab)

    def topk_buffers(self, options: LossOptions) -> int:
        """The logits and the soft-cap's slope."""
        return 1 + (options.softcap is not None)

    def sparse(
        self,
        z_CV: Tensor,
        entries: TeacherEntries,
        labels_C: Tensor,
        options: LossOptions,
        *,
        want_grad: bool,
        grad_dtype: torch.dtype | None = None,
        rows_C: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dz is in z_CV's dtype."""
        assert rows_C is None, "there are no in_place_dtypes"
        return torch.stack(sparse_step(z_CV, entries, labels_C, options, want_grad=want_grad)), z_CV

    def full(
        self,
        z_CV: Tensor,
        teacher_CV: Tensor,
        labels_C: Tensor,
        options: LossOptions,
        *,
        teacher_softcap: float | None,
        want_grad: bool,
        grad_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dz is in z_CV's dtype; the teacher's logits are destroyed, too."""
        sums = full_step(z_CV, teacher_CV, labels_C, options, teacher_softcap=teacher_softcap, want_grad=want_grad)
        return torch.stack(sums), z_CV

    def topk(self, z_CV: Tensor, k: int, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
        """A row of nothing but -inf has a log-sum-exp of -inf."""
        return topk_step(z_CV, k, options)

    def slices(
        self, entries: TeacherEntries, labels_C: Tensor, options: LossOptions, edges: Sequence[int]
    ) -> TorchSlices:
        """Waits for the device once."""
        return TorchSlices(entries, labels_C, options, edges)
