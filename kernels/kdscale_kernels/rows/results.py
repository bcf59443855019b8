"""What the steps over rows of logits return.

Legend: C rows, S entries of one slice of the vocabulary, R slices, K teacher entries, M candidates, T temperature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.rows.teacher_entries import TeacherEntries


class RowSums(NamedTuple):
    """Results of a sparse loss for each row of a chunk, each [C]."""

    loss_C: Tensor
    kd_C: Tensor
    ce_C: Tensor
    teacher_mass_C: Tensor
    student_tail_C: Tensor
    agree_C: Tensor


class FullRowSums(NamedTuple):
    """Results of a full-vocabulary loss for each row of a chunk, each [C]."""

    loss_C: Tensor
    kd_C: Tensor
    ce_C: Tensor
    teacher_ce_C: Tensor
    agree_C: Tensor


class EntryLogits(NamedTuple):
    """The student's capped logits at a row's entries, its label and the teacher's first id; filled slice by slice."""

    support_CK: Tensor
    label_C: Tensor
    top1_C: Tensor

    @classmethod
    def empty(cls, entries: TeacherEntries, labels_C: Tensor, vocab: int, dtype: torch.dtype) -> EntryLogits:
        """Zeros, so that ranks can add theirs up; NaN at ids outside the vocabulary, to poison their rows."""
        ids = (entries.ids_NK, labels_C, entries.top1_N)
        zeros = [torch.zeros(i.shape, dtype=dtype, device=i.device) for i in ids]
        return cls(*(z.masked_fill_((i < 0) | (i >= vocab), float("nan")) for z, i in zip(zeros, ids, strict=True)))


class TailSums(NamedTuple):
    """What one slice adds to a row's tail, each [C] (stacked over slices: [C, R])."""

    top_C: Tensor  # the largest logit
    plain_C: Tensor  # sum of exp(z - top)
    tempered_C: Tensor  # sum of exp((z - top) / T)


class Candidates(NamedTuple):
    """A row's M largest logits, and the sum over all others and the lowest of these."""

    ids_CM: Tensor  # in any order
    lowest_id_C: Tensor
    lowest_C: Tensor
    others_C: Tensor  # sum of exp((z - lowest) / T), 1 for the lowest included


class RowGradient(NamedTuple):
    """What a row's gradient is made of, in whichever slice."""

    values_CK: Tensor  # over the entries; the label's -ce_weight and the soft-cap's slope are in it
    tail_C: Tensor
    a_C: Tensor
    lse_C: Tensor
    b: float | Tensor  # ce_weight (one a row: [C]), or 0 where one exponential serves as both softmaxes
    label_C: Tensor | None  # added at the label outside the entries: -ce_weight times the soft-cap's slope

    @property
    def has_plain(self) -> bool:
        """Whether there is a second softmax, scaled by b."""
        return isinstance(self.b, Tensor) or self.b != 0.0


class SliceExponentials(NamedTuple):
    """A slice as `read` leaves it for `write_kept`: exponentials, rounded no more than dz itself will be.

    A row's dz is a constant times exp((z - top) / T), plus another times exp(z - top) where T != 1 and there is CE.
    """

    exponentials: tuple[Tensor, ...]  # one or two [C, S]
    top_C: Tensor
