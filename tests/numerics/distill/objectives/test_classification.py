"""The objective `classification` beside a twin that is written out text by text."""

from __future__ import annotations

import pytest
import torch

from kdscale.config.distill.encoder_objectives import ClassificationConfig
from kdscale.data.store_format import UNKNOWN_CLASS
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.classification import Classification
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import FullTargets, Targets

CLASSES = [2, UNKNOWN_CLASS, 0, 1]


def test_it_is_the_twin_and_learns_from_the_teacher_alone_where_no_class_is_known() -> None:
    torch.manual_seed(2)
    weight, bias, hidden = (torch.randn(shape, requires_grad=True) for shape in ((3, 6), (3,), (4, 6)))
    head = OutputHead(torch.randn(3, 8), torch.randn(3))
    teacher_NG = torch.randn(4, 8)
    batch = MicroBatch(torch.zeros(1, 4), torch.zeros(1, 4), torch.arange(4), torch.tensor(CLASSES))
    objective = Classification(ClassificationConfig(ce_weight=0.3, temperature=2.5))
    student = StudentOutput(hidden, OutputHead(weight, bias), 3)
    loss, terms = objective(student, Targets(rows=4, full=FullTargets(teacher_NG, head)), batch)

    expected = kl = agreed = 0.0
    for row, known in enumerate(CLASSES):
        own, theirs = weight @ hidden[row] + bias, head.weight_VH @ teacher_NG[row] + head.bias_V
        p = torch.softmax(theirs / 2.5, 0)
        kd = 2.5**2 * (p * (p.log() - torch.softmax(own / 2.5, 0).log())).sum()
        ce = -torch.softmax(own, 0)[known].log()
        expected = expected + (kd if known == UNKNOWN_CLASS else 0.3 * ce + 0.7 * kd)
        kl = kl + (torch.softmax(theirs, 0) * (torch.softmax(theirs, 0) / torch.softmax(own, 0)).log()).sum()
        agreed += float(own.argmax() == theirs.argmax())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.tolist() == pytest.approx([kl.item(), agreed], rel=1e-4)
    for got, want in zip(
        torch.autograd.grad(loss, [weight, hidden]), torch.autograd.grad(expected, [weight, hidden]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
