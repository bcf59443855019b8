"""The steps over rows of logits that every op is made of, and the one place that picks an implementation.

Legend: C rows, V vocabulary, S entries of a slice of the vocabulary, K teacher entries or logits kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kdscale_kernels.rows.bf16_steps import Bf16Steps
from kdscale_kernels.rows.results import EntryLogits, RowGradient, SliceExponentials, TailSums
from kdscale_kernels.rows.teacher_entries import TeacherEntries
from kdscale_kernels.rows.torch_steps import TorchRowSteps
from kdscale_kernels.types import LossOptions


class SliceSteps(Protocol):
    """The sparse step for rows whose logits come one slice of the vocabulary at a time: read all slices, then write."""

    def read(
        self, z_CS: Tensor, index: int, entry_logits: EntryLogits, keep: Sequence[Tensor] = ()
    ) -> tuple[TailSums, SliceExponentials | None]:
        """The sums of slice `index` over its tail and, with `keep`, what makes its dz without its logits.

        z_CS: raw logits, destroyed. entry_logits: filled where an id lies in the slice. keep: as many arrays [C,S] as
        options.exponentials, in the dtype that dz is wanted in.
        """

    def write(self, z_CS: Tensor, index: int, gradient: RowGradient, grad_dtype: torch.dtype) -> Tensor:
        """dz [C,S] of slice `index` in grad_dtype, in the memory of its raw logits z_CS where it fits."""

    def write_kept(self, kept: SliceExponentials, index: int, gradient: RowGradient) -> Tensor:
        """dz [C,S] of slice `index` from what `read` kept, in the dtype it was kept in."""


class RowSteps(Protocol):
    """What a backend implements. All steps take raw logits (before the soft-cap) and destroy them."""

    in_place_dtypes: tuple[torch.dtype, ...]  # of logits that `sparse` can overwrite where they are, by rows_C

    @property
    def bf16_steps(self) -> Bf16Steps | None:
        """None: the ops make no bf16 logits themselves, even where that is fast."""

    def sparse_buffers(self, options: LossOptions) -> int:
        """Arrays [C,V] of the accumulation dtype that `sparse` holds at once, the logits included."""

    def full_buffers(self, vocab: int) -> int:
        """Likewise for `full`: the logits of both models included."""

    def topk_buffers(self, options: LossOptions) -> int:
        """Likewise for `topk`."""

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
        """(sums [6,C] in the order of RowSums, dz [C,V] in z_CV's memory) of a loss on K teacher entries per row.

        grad_dtype: what the products after it want; torch leaves dz in z_CV's dtype. rows_C [C] picks rows of z_CV,
        for its in_place_dtypes only.
        """

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
        """(sums [5,C] in the order of FullRowSums, dz [C,V] in z_CV's memory) over the whole vocabulary."""

    def topk(self, z_CV: Tensor, k: int, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [C,k], logits [C,k], logsumexp(z / T) [C]), descending; of equal logits the lower id, NaN first."""

    def slices(
        self, entries: TeacherEntries, labels_C: Tensor, options: LossOptions, edges: Sequence[int]
    ) -> SliceSteps:
        """The steps over slices edges[i] to edges[i + 1] of the vocabulary."""


def _triton() -> RowSteps:
    from kdscale_kernels.triton_kernels.steps import TritonRowSteps

    return TritonRowSteps()


def _compiled() -> RowSteps:
    from kdscale_kernels.c_kernels.steps import CompiledRowSteps

    return CompiledRowSteps()


ROW_STEPS: dict[str, Callable[[], RowSteps]] = {"torch": TorchRowSteps, "compiled": _compiled, "triton": _triton}


def row_steps(backend: str) -> RowSteps:
    """The steps of a backend that choose_backend returned."""
    return ROW_STEPS[backend]()
