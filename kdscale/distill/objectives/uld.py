"""ULD: a teacher with another tokenizer also teaches by its probabilities of tokens that the student does not have.

Sorted, they need no common names: Σ_i |p_(i) − q_(i)| is the Wasserstein distance at which every token is as far from
every other (Boizard et al. 2024, arXiv 2402.12030). As in TRL's GOLD it is only over tokens without a match; those of
both tokenizers are matched exactly (token_divergence). Of either side the K most likely count: sorted, these are the
first K terms of the sum, and the others add at most what is left of both sides' probabilities.

N rows, C rows of a chunk, K terms, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from kdscale.config.distill.objectives import UldConfig
from kdscale.config.distill.schedules import at
from kdscale.distill.objectives.base import StudentOutput
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets
from kdscale_kernels.fused.autograd import ForwardResult, runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.products import GradientSums, HeadProducts, chunk_bytes_for, compute_dtypes, row_chunks


class Uld:
    """The objective `uld`. Its sums are fp32, without a host sync."""

    def __init__(self, settings: UldConfig):
        self._settings = settings

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, sums of teacher_unmatched and student_unmatched)."""
        unmatched, settings = targets.unmatched, self._settings
        assert unmatched is not None
        p_NK = unmatched.p_NK[:, : settings.top_k]
        counts_N = unmatched.told_N
        if settings.unaligned == "compare":
            counts_N = counts_N | (p_NK[:, 0] > 0.0)
        lacking_V = pad(unmatched.lacking_V, (0, max(0, student.vocab_size - len(unmatched.lacking_V))))
        loss, of_student = sorted_loss(
            student, p_NK, batch.labels_N, unmatched.told_N, counts_N, lacking_V[: student.vocab_size],
            at(settings.temperature, batch.step),
        )  # fmt: skip
        of_teacher = (unmatched.p_NK.sum(1) * unmatched.told_N).sum()
        return loss, torch.stack([of_teacher, of_student.float()])


class _Call(NamedTuple):
    p_NK: torch.Tensor
    labels_N: torch.Tensor
    told_N: torch.Tensor
    counts_N: torch.Tensor
    lacking_V: torch.Tensor
    temperature: float
    softcap: float | None
    operand: torch.dtype
    accumulate: torch.dtype
    wants_grad: tuple[bool, ...]


@runs_eagerly
def sorted_loss(
    student: StudentOutput,
    p_NK: torch.Tensor,
    labels_N: torch.Tensor,
    told_N: torch.Tensor,
    counts_N: torch.Tensor,
    lacking_V: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ |p_(i) − q_(i)| over the rows of `counts_N` and the first K, differentiable once; Σ q of lacking tokens).

    `p_NK` is sorted, the largest first. On rows of `told_N` q is over the student's tokens of `lacking_V` (bool) but
    the label, which has its probability from the alignment; on other rows it is over all of them. The second sum is
    over the rows of `told_N`. The gradients are made in the forward, a chunk of logits at a time.
    """
    hidden_NH, weight_VH = student.hidden_NH, student.head.weight_VH
    call = _Call(
        p_NK, labels_N, told_N, counts_N, lacking_V, temperature, student.head.softcap,
        *compute_dtypes(hidden_NH, weight_VH), wants_gradients(hidden_NH, weight_VH, student.head.bias_V),
    )  # fmt: skip
    loss, of_student = with_forward_gradients("sorted_loss", _run, hidden_NH, weight_VH, student.head.bias_V, call)
    return loss, of_student


def _run(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, call: _Call) -> ForwardResult:
    rows, vocab, terms = len(hidden_NH), len(call.lacking_V), call.p_NK.shape[1]
    head = HeadProducts(weight_VH, bias_V, call.operand, call.accumulate, vocab)
    gradients = GradientSums(hidden_NH, weight_VH, call.wants_grad, head, rows)
    loss, of_student = (hidden_NH.new_zeros((), dtype=call.accumulate) for _ in range(2))
    index_N = torch.arange(rows, device=hidden_NH.device)
    budget = chunk_bytes_for(None, hidden_NH.device)
    for chunk in row_chunks(rows, vocab, budget, buffers=4, item_bytes=call.accumulate.itemsize):
        hidden_CH, told_C1 = head.cast(hidden_NH.detach()[chunk]), call.told_N[chunk, None]
        z_CV = head.logits(hidden_CH, hidden_CH.new_empty(len(hidden_CH), vocab, dtype=call.accumulate))
        if call.softcap is not None:
            z_CV = call.softcap * torch.tanh(z_CV / call.softcap)
        q_CV = (z_CV / call.temperature).softmax(1)
        compared_CV = q_CV * (call.lacking_V | ~told_C1)
        compared_CV.scatter_(
            1, call.labels_N[chunk, None], compared_CV.gather(1, call.labels_N[chunk, None]) * ~told_C1
        )
        of_student = of_student + (compared_CV * told_C1).sum()
        q_CK, ids_CK = compared_CV.topk(min(terms, vocab), sorted=True)
        gap_CK = q_CK - call.p_NK[chunk, : q_CK.shape[1]]
        loss = loss + (gap_CK.abs() * call.counts_N[chunk, None]).sum()
        if any(call.wants_grad):
            # d|q − p|/dq, where the token is compared at all
            slope_CK = gap_CK.sign() * call.counts_N[chunk, None] * (q_CK > 0.0)
            dz_CV = compared_CV.zero_().scatter_(1, ids_CK, slope_CK).sub_((slope_CK * q_CK).sum(1, keepdim=True))
            dz_CV.mul_(q_CV).div_(call.temperature)
            if call.softcap is not None:
                dz_CV.mul_(1.0 - (z_CV / call.softcap).square())
            gradients.add(dz_CV, hidden_CH, index_N[chunk])
    return ForwardResult((loss, of_student), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
