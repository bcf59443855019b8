"""Cross-entropy without a teacher: its loss, its gradients and what it needs."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from kdscale.config.distill.objectives import CrossEntropyConfig, TokenDivergenceConfig
from kdscale.config.distill.settings import DistillConfig
from kdscale.config.distill.targets import SOURCES
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.cross_entropy import CrossEntropy
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, shared_vocabulary


def test_loss_and_gradients_are_torchs_own() -> None:
    """In fp64, with a head that has rows beyond the vocabulary, and a label that the student gets right."""
    gen = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((7, 8), (33, 8)))
    logits_NV = (hidden_NH @ weight_VH.T)[:, :30]
    labels_N = torch.randint(0, 30, (7,), generator=gen)
    labels_N[2] = logits_NV[2].argmax()
    right = (logits_NV.argmax(1) == labels_N).sum()
    ours, torchs = ([t.clone().requires_grad_() for t in (hidden_NH, weight_VH)] for _ in range(2))
    batch = MicroBatch(labels_N[None], labels_N[None], torch.arange(7), labels_N)
    student = StudentOutput(ours[0], OutputHead(ours[1]), 30)
    loss, terms = CrossEntropy(CrossEntropyConfig())(student, Targets(rows=7), batch)
    want = F.cross_entropy((torchs[0] @ torchs[1].T)[:, :30], labels_N, reduction="sum")
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want)
    assert terms.tolist() == pytest.approx([want.item(), right.item()])
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("placement", ["replicated", "served"])
def test_alone_it_opens_no_source_whatever_the_placement(placement: str) -> None:
    alone = DistillConfig(objectives=(CrossEntropyConfig(),), teacher_placement=placement)
    assert alone.source is SOURCES["text"]
    assert alone.needs.in_words() == "text alone"
    assert shared_vocabulary(None, 320, 300, "student") == 320


def test_beside_a_divergence_it_would_log_the_same_column_twice() -> None:
    with pytest.raises(ValidationError, match=r"no two may log the same column; twice: \['ce'\]"):
        DistillConfig(objectives=(CrossEntropyConfig(), TokenDivergenceConfig()))
