"""The inputs that all contestants get, and the exact gradients that they are compared with.

Legend: N rows, H hidden size, V vocabulary, K teacher entries, p teacher, q student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from shapes import LossShape
from torch import Tensor

# Student = teacher + noise, in units of the hidden states' deviation; None: two unrelated models. Timed at 0.3.
REGIMES: dict[str, float | None] = {"random": None, "noise_03": 0.3, "noise_005": 0.05}
TIMED_NOISE = 0.3
ERROR_ROWS = 128


@dataclass
class Inputs:
    """One batch. The teacher and the student share the head; hidden_NH and weight_VH are leaves that want gradients."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_NH: Tensor
    labels_N: Tensor
    ids_NK: Tensor
    logits_NK: Tensor
    lse_N: Tensor
    student_logits_NV: Tensor | None = None  # only for losses on logits that already exist: a leaf
    teacher_probs_NV: Tensor | None = None  # only for peers that want the teacher's whole distribution as an input

    def forget_gradients(self) -> None:
        """Clear what the last call left in the leaves."""
        for leaf in (self.hidden_NH, self.weight_VH, self.student_logits_NV):
            if leaf is not None:
                leaf.grad = None

    def with_own_logits(self) -> Inputs:
        """For a loss that writes over the logits."""
        assert self.student_logits_NV is not None
        return replace(self, student_logits_NV=self.student_logits_NV.detach().clone().requires_grad_())

    def gradients(self) -> tuple[Tensor | None, ...]:
        """(dX, dW); for a loss on logits (gradient of the logits, None)."""
        if self.student_logits_NV is not None:
            return self.student_logits_NV.grad, None
        return self.hidden_NH.grad, self.weight_VH.grad


def make_inputs(
    shape: LossShape, dtype: torch.dtype, device: torch.device, noise: float | None = TIMED_NOISE, needs: str = ""
) -> Inputs:
    """needs: "student_logits" or "teacher_probs" adds that [N,V] tensor to the inputs."""
    gen = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device)

    weight_VH = (randn(shape.v, shape.h) * (4.0 / math.sqrt(shape.h))).to(dtype)
    teacher_NH = randn(shape.n, shape.h).to(dtype)
    student_NH = randn(shape.n, shape.h) if noise is None else teacher_NH.float() + noise * randn(shape.n, shape.h)
    inputs = Inputs(
        student_NH.to(dtype).requires_grad_(),
        weight_VH.requires_grad_(),
        teacher_NH,
        torch.randint(0, shape.v, (shape.n,), generator=gen, device=device),
        *_targets(teacher_NH, weight_VH.detach(), shape.k),
    )
    with torch.no_grad():
        if needs == "student_logits":
            inputs.student_logits_NV = F.linear(inputs.hidden_NH, weight_VH).requires_grad_()
        if needs == "teacher_probs":
            inputs.teacher_probs_NV = F.linear(teacher_NH, weight_VH).float().softmax(1).to(dtype)
    return inputs


def _targets(teacher_NH: Tensor, weight_VH: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, logits [N,K] and log-sum-exp [N] in fp32, by plain torch in small blocks of rows: nobody's kernel."""
    parts = []
    weight_VH = weight_VH.float()
    for rows_CH in teacher_NH.float().split(max(1, (64 << 20) // (4 * weight_VH.shape[0]))):
        logits_CV = rows_CH @ weight_VH.T
        top = logits_CV.topk(k, dim=1)
        parts.append((top.indices, top.values, logits_CV.logsumexp(1)))
    ids, logits, lse = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, logits, lse


def _sparse(q: Tensor, p: Tensor, inputs: Inputs) -> Tensor:
    """Forward KL on K+1 buckets; both tails are summed over what is outside, never subtracted from one."""
    outside_NV = torch.ones_like(q, dtype=torch.bool).scatter_(1, inputs.ids_NK, False)
    logp_NK = inputs.logits_NK.double() - inputs.lse_N.double()[:, None]
    p_tail_N = -torch.expm1(logp_NK.logsumexp(1))
    q_tail_N = q.masked_fill(~outside_NV, -math.inf).logsumexp(1)
    support = (logp_NK.exp() * (logp_NK - q.gather(1, inputs.ids_NK))).sum()
    return support + (p_tail_N * (p_tail_N.log() - q_tail_N)).sum()


def _jsd(q: Tensor, p: Tensor, inputs: Inputs) -> Tensor:
    m = torch.logaddexp(p, q) - math.log(2.0)
    return 0.5 * (p.exp() * (p - m)).sum() + 0.5 * (q.exp() * (q - m)).sum()


# From the log-probabilities of both, [N,V] fp64, to the sum over rows.
LOSSES: dict[str, Callable[[Tensor, Tensor, Inputs], Tensor]] = {
    "sparse KL": _sparse,
    "full KL": lambda q, p, inputs: (p.exp() * (p - q)).sum(),
    "full JSD": _jsd,
    "CE": lambda q, p, inputs: F.nll_loss(q, inputs.labels_N, reduction="sum"),
}


def exact_gradients(inputs: Inputs, losses: Iterable[str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By loss: (dX, dW), or (gradient of the logits, None); fp64, by autograd through the whole logits."""
    weight_VH, hidden_NH = inputs.weight_VH.detach().double(), inputs.hidden_NH.detach().double()
    given_NV = inputs.student_logits_NV
    z_NV = hidden_NH @ weight_VH.T if given_NV is None else given_NV.detach().double()
    logp_NV = (inputs.teacher_NH.double() @ weight_VH.T).log_softmax(1)
    gradients: dict[str, tuple[Tensor, Tensor | None]] = {}
    for loss in losses:
        leaf_NV = z_NV.clone().requires_grad_()
        LOSSES[loss](leaf_NV.log_softmax(1), logp_NV, inputs).backward()
        assert leaf_NV.grad is not None
        dz_NV = leaf_NV.grad
        gradients[loss] = (dz_NV @ weight_VH, dz_NV.T @ hidden_NH) if given_NV is None else (dz_NV, None)
    return gradients


def relative_errors(inputs: Inputs, scale: float, exact: tuple[Tensor, Tensor | None]) -> list[float]:
    """Frobenius norm of the difference over that of the truth, for each gradient there is."""
    pairs = zip(inputs.gradients(), exact, strict=True)
    return [
        ((got.double() * scale - want).norm() / want.norm()).item()
        for got, want in pairs
        if got is not None and want is not None
    ]
