"""Gains of norms in closed form, for a student whose stream is a turned and narrower one (stream_refit.py).

N tokens · D teacher's hidden · H student's hidden · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdscale.models.hidden_states import HiddenStates
from kdscale.models.layer_pass import add_product
from kdscale.models.layer_stream import LayerStream, TokenBatch
from kdscale.prune.compensation.regression import solve_in_place
from kdscale.prune.stream_cut import CutStudent
from kdscale.runtime.ranks import all_reduce_sum

_RIDGE = 1e-2  # of the mean diagonal
_SMALLEST_SHARE = 0.1  # that a channel's a may have of what it would be if its size did not vary


class SublayerSizes:
    """The gain g' of a norm between a sublayer and the stream.

    The norm gives every token the same size, so what the sublayer is to add, y [N, H], must have y / g' of one size. In
    a turned stream no g' makes it so; a = 1/(H g'²) is taken as the least-squares solution of Σ_j a_j y_j² = 1 over the
    tokens. Sums of y² and of y² y²ᵀ are all that needs.
    """

    def __init__(self, hidden: int, device: torch.device):
        self._first_H = torch.zeros(hidden, dtype=torch.float64, device=device)
        self._second_HH = torch.zeros(hidden, hidden, device=device)
        self._tokens = torch.zeros(1, dtype=torch.float64)

    def add(self, added: Tensor) -> None:
        """Count what the sublayer of the teacher adds, cut to the student's stream: [..., H]."""
        squares_NH = added.flatten(0, -2).square()
        self._first_H += squares_NH.double().sum(0)
        add_product(self._second_HH, squares_NH, squares_NH)
        self._tokens += len(squares_NH)

    def gain(self) -> Tensor:
        """g' [H] in fp32, over the tokens of all ranks."""
        count = float(all_reduce_sum(self._tokens))
        first_H = (all_reduce_sum(self._first_H) / count).clamp_min(1e-30)
        second_HH = all_reduce_sum(self._second_HH).double() / count
        start_H = 1 / (len(first_H) * first_H)  # right if each channel had the same size in every token
        left_HH = start_H[:, None] * second_HH * start_H
        right_H = start_H * first_H - left_HH.sum(1)
        left_HH.diagonal().add_(_RIDGE * left_HH.diagonal().mean())
        share_H = (1 + torch.nan_to_num(solve_in_place(left_HH, right_H[None])[0])).clamp_min(_SMALLEST_SHARE)
        return (1 / (len(first_H) * start_H * share_H)).sqrt().float()


def fitted_final_norm(
    teacher: LayerStream, student: LayerStream, start: CutStudent, states: HiddenStates, batches: Sequence[TokenBatch]
) -> Tensor:
    """The student's final norm as it is on disk, fp32 on the CPU, with the gain that brings its logits nearest.

    `states` begin with the teacher's D and the student's H numbers of each token. With h = g x̂ what the teacher's head
    reads, ẑ the student's normalised states, B the map from the teacher's head to the student's and F the covariance of
    the head's rows that `batches` name: argmin over γ of Σ (B γẑ − h)ᵀ F (B γẑ − h) + λ‖γ − γ_start‖².
    """
    teacher_norm, student_norm = teacher.final_norm(), student.final_norm()
    sizes, device = [teacher.dims.hidden, student.dims.hidden], teacher.device
    gram_HH = torch.zeros(sizes[1], sizes[1], device=device)
    cross_DH = torch.zeros(sizes[0], sizes[1], device=device)
    for state in states:
        teacher_ND, student_NH = state.flatten(0, -2)[:, : sum(sizes)].split(sizes, dim=-1)
        seen_NH = student_norm(student_NH).float() / start.final_gain
        add_product(gram_HH, seen_NH, seen_NH)
        add_product(cross_DH, teacher_norm(teacher_ND), seen_NH)
    gram_HH, cross_DH = all_reduce_sum(gram_HH).double(), all_reduce_sum(cross_DH).double()
    head_DH = start.head_map.to(device)
    weighed_HD = head_DH.T @ _covariance_of_rows(start, batches, device)
    left_HH = (weighed_HD @ head_DH) * gram_HH
    gain_H = left_HH.new_full((sizes[1],), start.final_gain)
    right_H = (weighed_HD.T * cross_DH).sum(0) - left_HH @ gain_H
    left_HH.diagonal().add_((_RIDGE * left_HH.diagonal().mean()).clamp_min(1e-30))
    return start.as_weight(gain_H + solve_in_place(left_HH, right_H[None])[0]).cpu()


def _covariance_of_rows(start: CutStudent, batches: Sequence[TokenBatch], device: torch.device) -> Tensor:
    """[D, D] in fp64: of the rows of the teacher's head, each as often as its token is in the batches of all ranks."""
    slicer = start.slicer
    role = "embed" if slicer.family.tied(slicer.teacher_config) else "head"
    (origin,) = (tensor for tensor in slicer.outer() if tensor.spec.role == role)
    counts_V = torch.zeros(origin.spec.shape[0], dtype=torch.float64)
    for batch in batches:
        ids_N = batch.input_ids_BS.flatten().cpu()
        counts_V.index_add_(0, ids_N, torch.ones(len(ids_N), dtype=torch.float64))
    counts_V = all_reduce_sum(counts_V)
    named = counts_V.nonzero()[:, 0]
    share_N1 = (counts_V[named] / counts_V.sum()).to(device)[:, None]
    rows_ND = start.read(origin.source)[named].to(device).double()
    rows_ND = rows_ND - (share_N1 * rows_ND).sum(0)
    return rows_ND.T @ (share_N1 * rows_ND)
