"""The policy gradient in fp64 against the reverse KL it stands for, and against the loss written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdscale.config.distill.objectives import PolicyGradientConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.policy_gradient import PolicyGradient
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import LabelTargets, Targets

N, H, V, ROWS_OF_HEAD = 6, 5, 11, 13
SOFTCAP = 4.0


@pytest.fixture
def models() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = {
        "hidden_NH": (N, H), "weight_VH": (ROWS_OF_HEAD, H), "bias_V": (ROWS_OF_HEAD,), "teacher_NV": (N, V)
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in random.items()}


def student_logprobs(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
    logits_NV = SOFTCAP * torch.tanh((hidden_NH @ weight_VH.T + bias_V) / SOFTCAP)
    return logits_NV[:, :V].log_softmax(1)


def measured(settings: PolicyGradientConfig, models: dict[str, Tensor], labels_N: Tensor, wrote_N: Tensor) -> Any:
    """(loss, terms, gradients of hidden states, weight and bias)."""
    leaves = [models[name].clone().requires_grad_() for name in ("hidden_NH", "weight_VH", "bias_V")]
    student = StudentOutput(leaves[0], OutputHead(leaves[1], leaves[2], SOFTCAP), V)
    teacher_N = models["teacher_NV"].log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    ids = torch.zeros(2, N // 2, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(N), labels_N, logprobs_N=wrote_N)
    loss, terms = PolicyGradient(settings)(student, Targets(rows=N, label=LabelTargets(teacher_N)), batch)
    loss.backward()
    return loss.detach(), terms, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_its_mean_over_draws_is_the_gradient_of_the_reverse_kl(models: dict[str, Tensor], clip: float | None) -> None:
    """Every token that may be drawn, weighted by its probability."""
    leaves = [models[name].clone().requires_grad_() for name in ("hidden_NH", "weight_VH", "bias_V")]
    logp_NV = student_logprobs(*leaves)
    (logp_NV.exp() * (logp_NV - models["teacher_NV"].log_softmax(1))).sum().backward()
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for row in range(N):  # one row at a time: the weights of rows differ
        own = {
            **models,
            "hidden_NH": models["hidden_NH"][row].expand(N, H),
            "teacher_NV": models["teacher_NV"][row].expand(N, V),
        }
        for token in range(V):
            labels_N, wrote = torch.full((N,), token), logp_NV.detach()[row, token]
            _, _, gradients = measured(PolicyGradientConfig(clip=clip), own, labels_N, wrote.expand(N))
            p = wrote.exp()
            total[0][row] += p * gradients[0][0]
            for place in (1, 2):
                total[place] += p * gradients[place] / N
    for part, leaf in zip(total, leaves, strict=True):
        torch.testing.assert_close(part, leaf.grad, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("baseline", ["none", "sequence"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_is_as_written_out(models: dict[str, Tensor], clip: float | None, baseline: Any) -> None:
    labels_N = torch.tensor([3, 0, 10, 7, 7, 1])
    leaves = [models[name].clone().requires_grad_() for name in ("hidden_NH", "weight_VH", "bias_V")]
    logp_N = student_logprobs(*leaves).gather(1, labels_N[:, None])[:, 0]
    teacher_N = models["teacher_NV"].log_softmax(1).gather(1, labels_N[:, None])[:, 0]
    wrote_N = logp_N.detach() + torch.tensor([0.5, -0.5, 0.1, -0.1, 0.3, 0.0])
    base_N = (teacher_N - wrote_N).view(2, -1).mean(1, keepdim=True).expand(2, N // 2).flatten()
    base_N = base_N if baseline == "sequence" else torch.zeros(N)
    if clip is None:
        expected = -((teacher_N - logp_N.detach() - base_N) * logp_N).sum()
    else:
        reward_N, ratio_N = teacher_N - wrote_N - base_N, (logp_N - wrote_N).exp()
        expected = -torch.minimum(ratio_N * reward_N, ratio_N.clamp(0.8, 1.2) * reward_N).sum()
    expected.backward()
    loss, terms, gradients = measured(PolicyGradientConfig(clip=clip, baseline=baseline), models, labels_N, wrote_N)
    torch.testing.assert_close(loss, expected.detach())
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)
    ratio_N = (logp_N.detach() - wrote_N).exp()
    outside = 0.0 if clip is None else float(((ratio_N - 1).abs() > 0.2).sum())
    expected_terms = [float((logp_N.detach() - teacher_N).sum()), float(ratio_N.sum()), outside]
    assert terms.tolist() == pytest.approx(expected_terms)
