"""Losses of the log-probabilities of labels, from final hidden states: no N×V tensor is made.

N rows (valid positions), C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kdscale.distill.objectives.base import StudentOutput
from kdscale_kernels.fused.autograd import ForwardResult, runs_eagerly, wants_gradients, with_forward_gradients
from kdscale_kernels.fused.products import GradientSums, HeadProducts, chunk_bytes_for, compute_dtypes, row_chunks


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


@torch.no_grad()
def label_logprobs(student: StudentOutput, labels_N: torch.Tensor) -> torch.Tensor:
    """The log-probabilities [N] (fp32) of the labels, without gradients."""
    return label_loss(student, labels_N, lambda logprobs_C, _rows: logprobs_C)[1]
