"""The steps over rows of logits, by the torch or the Triton implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale_kernels.rows.results import Found, Kept, Parts, RowGradient
from kdscale_kernels.rows.teacher_entries import Targets
from kdscale_kernels.rows.torch_full import full_rows_step
from kdscale_kernels.rows.torch_slices import Places, read_slice, write_kept, write_slice
from kdscale_kernels.rows.torch_sparse import rows_step
from kdscale_kernels.types import LossOptions


def run_rows_step(
    backend: str,
    z_CV: Tensor,
    targets: Targets,
    labels_C: Tensor,
    options: LossOptions,
    *,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(sums [6, C] in the order of RowSums, dz [C, V] in z_CV's memory) by the chosen backend.

    grad_dtype is the dtype that the products after it want; the torch path leaves dz as z_CV is.
    """
    if backend == "triton":
        from kdscale_kernels.triton_kernels.sparse import rows_step_triton

        return rows_step_triton(z_CV, targets, labels_C, options, want_grad=want_grad, grad_dtype=grad_dtype)
    return torch.stack(rows_step(z_CV, targets, labels_C, options, want_grad=want_grad)), z_CV


def run_full_rows_step(
    backend: str,
    z_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    options: LossOptions,
    *,
    teacher_softcap: float | None,
    want_grad: bool,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(sums [5, C] in the order of FullRowSums, dz [C, V] in z_CV's memory) by the chosen backend.

    grad_dtype is the dtype that the products after it want; the torch path leaves dz as z_CV is.
    """
    if backend == "triton":
        from kdscale_kernels.triton_kernels.full import full_rows_step_triton

        return full_rows_step_triton(
            z_CV,
            teacher_CV,
            labels_C,
            options,
            teacher_softcap=teacher_softcap,
            want_grad=want_grad,
            grad_dtype=grad_dtype,
        )
    sums = full_rows_step(z_CV, teacher_CV, labels_C, options, teacher_softcap=teacher_softcap, want_grad=want_grad)
    return torch.stack(sums), z_CV


class SliceSteps:
    """read_slice, write_slice and write_kept over one set of rows, by the chosen backend."""

    def __init__(self, backend: str, targets: Targets, labels_C: Tensor, options: LossOptions, edges: Sequence[int]):
        self._triton = backend == "triton"
        self._targets, self._labels_C, self._options, self._edges = targets, labels_C, options, edges
        self._places = None if self._triton else Places(targets, labels_C, edges)

    def read(self, z_CS: Tensor, index: int, found: Found, keep: Sequence[Tensor]) -> tuple[Parts, Kept | None]:
        """As read_slice."""
        if self._places is not None:
            return read_slice(z_CS, index, self._places, found, self._options, keep)
        from kdscale_kernels.triton_kernels.slices import read_slice_triton

        return read_slice_triton(z_CS, self._edges[index], self._targets, self._labels_C, found, self._options, keep)

    def write(self, z_CS: Tensor, index: int, gradient: RowGradient, grad_dtype: torch.dtype) -> Tensor:
        """As write_slice; dz in grad_dtype, in z_CS's memory where it can be."""
        if self._places is not None:
            write_slice(z_CS, index, self._places, gradient, self._options)
            return z_CS.to(grad_dtype)
        from kdscale_kernels.triton_kernels.slices import write_slice_triton

        first = self._edges[index]
        return write_slice_triton(z_CS, first, self._targets, self._labels_C, gradient, self._options, grad_dtype)

    def write_kept(self, kept: Kept, index: int, gradient: RowGradient) -> Tensor:
        """As write_kept."""
        if self._places is not None:
            return write_kept(kept, index, self._places, gradient, self._options)
        from kdscale_kernels.triton_kernels.slices import write_kept_triton

        return write_kept_triton(kept, self._edges[index], self._targets, self._labels_C, gradient, self._options)
