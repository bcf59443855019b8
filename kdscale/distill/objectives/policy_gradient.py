"""The reverse KL to the teacher by its policy gradient, on tokens that the student drew itself.

For a token a that the student drew, log p_T(a) − log p_S(a) is an unbiased estimate of −KL(p_S ‖ p_T) at its place, and
the gradient of that estimate's expected value is E[(log p_T − log p_S)·∇log p_S] (REINFORCE; Lu and Thinking Machines
Lab, "On-Policy Distillation", 2025). Samples that were written some steps ago are corrected by the importance ratio
p_S / p_S-as-it-wrote, within 1 ± clip (PPO, arXiv 1707.06347, equation 7).

N rows (valid positions), C rows of a chunk, B sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kdscale.config.distill.objectives import PolicyGradientConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets
from kdscale_kernels.fused.autograd import ForwardResult, runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.products import GradientSums, HeadProducts, chunk_bytes_for, compute_dtypes, row_chunks

_MOST_LOG_RATIO = 20.0  # beyond it the ratio stays what it is


class PolicyGradient:
    """The objective `policy_gradient`. Its sums are fp32, without a host sync."""

    def __init__(self, settings: PolicyGradientConfig):
        self._settings = settings

    def __call__(
        self, student: StudentOutput, targets: Targets, batch: MicroBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, sums of reverse_kl, ratio and clipped)."""
        assert targets.label is not None and batch.logprobs_N is not None
        teacher_N, wrote_N, clip = targets.label.logprobs_N, batch.logprobs_N, self._settings.clip
        baseline_N = torch.zeros_like(wrote_N)
        if self._settings.baseline == "sequence":
            baseline_N = _means_of_sequences(teacher_N - wrote_N, batch)

        def loss_of(logprobs_C: torch.Tensor, rows: slice) -> torch.Tensor:
            if clip is None:
                return -(teacher_N[rows] - logprobs_C.detach() - baseline_N[rows]) * logprobs_C
            reward_C = teacher_N[rows] - wrote_N[rows] - baseline_N[rows]
            ratio_C = (logprobs_C - wrote_N[rows]).clamp(max=_MOST_LOG_RATIO).exp()
            return -torch.minimum(ratio_C * reward_C, ratio_C.clamp(1.0 - clip, 1.0 + clip) * reward_C)

        loss, logprobs_N = label_loss(student, batch.labels_N, loss_of)
        ratio_N = (logprobs_N - wrote_N).clamp(max=_MOST_LOG_RATIO).exp()
        clipped_N = torch.zeros_like(ratio_N) if clip is None else ((ratio_N - 1.0).abs() > clip).float()
        return loss, torch.stack([(logprobs_N - teacher_N).sum(), ratio_N.sum(), clipped_N.sum()])


def _means_of_sequences(values_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """For each row the mean of the values of its sequence's rows."""
    sequences, length = batch.input_ids_BS.shape
    of_N = batch.rows_N // length
    sums_B = values_N.new_zeros(sequences).index_add(0, of_N, values_N)
    counts_B = values_N.new_zeros(sequences).index_add(0, of_N, torch.ones_like(values_N))
    return (sums_B / counts_B.clamp_min(1.0))[of_N]


class _Call(NamedTuple):
    labels_N: torch.Tensor
    loss_of: Callable[[torch.Tensor, slice], torch.Tensor]
    softcap: float | None
    vocab: int
    operand: torch.dtype
    accumulate: torch.dtype
    wants_grad: tuple[bool, ...]


@runs_eagerly
def label_loss(
    student: StudentOutput, labels_N: torch.Tensor, loss_of: Callable[[torch.Tensor, slice], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of the log-probabilities [N] of the labels: its sum, which is differentiable once, and they themselves.

    `loss_of` takes the log-probabilities (fp32) of some rows and says which rows these are; it returns a loss for each.
    The gradients are made in the forward, a chunk of logits at a time, as those of the kernels are.
    """
    hidden_NH, weight_VH = student.hidden_NH, student.head.weight_VH
    call = _Call(
        labels_N, loss_of, student.head.softcap, student.vocab_size, *compute_dtypes(hidden_NH, weight_VH),
        wants_gradients(hidden_NH, weight_VH, student.head.bias_V),
    )  # fmt: skip
    loss, logprobs_N = with_forward_gradients("label_loss", _run, hidden_NH, weight_VH, student.head.bias_V, call)
    return loss, logprobs_N


def _run(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, call: _Call) -> ForwardResult:
    head = HeadProducts(weight_VH, bias_V, call.operand, call.accumulate, call.vocab)
    rows, want_grad = len(hidden_NH), any(call.wants_grad)
    gradients = GradientSums(hidden_NH, weight_VH, call.wants_grad, head, rows)
    logprobs_N = hidden_NH.new_empty(rows, dtype=call.accumulate)
    loss = hidden_NH.new_zeros((), dtype=call.accumulate)
    index_N = torch.arange(rows, device=hidden_NH.device)
    budget = chunk_bytes_for(None, hidden_NH.device)
    for chunk in row_chunks(rows, call.vocab, budget, buffers=4, item_bytes=call.accumulate.itemsize):
        hidden_CH, labels_C1 = head.cast(hidden_NH.detach()[chunk]), call.labels_N[chunk, None]
        z_CV = head.logits(hidden_CH, hidden_CH.new_empty(len(hidden_CH), call.vocab, dtype=call.accumulate))
        if call.softcap is not None:
            z_CV = call.softcap * torch.tanh(z_CV / call.softcap)
        logp_CV = z_CV.log_softmax(1)
        with torch.enable_grad():
            own_C = logp_CV.gather(1, labels_C1)[:, 0].requires_grad_()
            loss_C = call.loss_of(own_C, chunk).sum()
            (factor_C,) = torch.autograd.grad(loss_C, own_C)
        logprobs_N[chunk], loss = own_C.detach(), loss + loss_C.detach()
        if want_grad:
            dz_CV = logp_CV.exp_().mul_(-factor_C[:, None]).scatter_add_(1, labels_C1, factor_C[:, None])
            if call.softcap is not None:
                dz_CV.mul_(1.0 - (z_CV / call.softcap).square())
            gradients.add(dz_CV, hidden_CH, index_N[chunk])
    return ForwardResult((loss, logprobs_N), gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
