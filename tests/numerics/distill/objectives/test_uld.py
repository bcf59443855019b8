"""ULD against a naive sum over sorted probabilities in fp64: loss, figures and gradients, whatever the chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kdscale.config.distill.objectives import UldConfig
from kdscale.config.distill.settings import DistillConfig
from kdscale.distill.objectives import uld
from kdscale.distill.objectives.base import StudentOutput
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets, UnmatchedTargets

N, H, V = 13, 6, 30


def rows(dtype: torch.dtype = torch.float64, softcap: float | None = None) -> tuple[StudentOutput, Any, Any]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    head = OutputHead(draw(V + 2, H), draw(V + 2), softcap)
    student = StudentOutput(draw(N, H), head, V)
    p_NK = torch.rand(N, 9, generator=generator).sort(1, descending=True).values * 0.1
    p_NK[3], p_NK[7] = 0.0, 0.0  # no token without a match, and a row before the teacher's first token
    told_N = torch.ones(N, dtype=torch.bool)
    told_N[5:8] = False
    lacking_V = torch.rand(V, generator=generator) < 0.4
    labels_N = torch.randint(0, V, (N,), generator=generator)
    labels_N[0] = int(lacking_V.nonzero()[0])
    batch = MicroBatch(torch.zeros(1, N), torch.zeros(1, N), torch.arange(N), labels_N)
    return student, UnmatchedTargets(p_NK, told_N, lacking_V, 2.0), batch


def naive(student: StudentOutput, unmatched: UnmatchedTargets, batch: MicroBatch, settings: UldConfig) -> torch.Tensor:
    head, total = student.head, torch.zeros((), dtype=torch.float64)
    logits_NV = student.hidden_NH @ head.weight_VH.T + head.bias_V
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    q_NV = (logits_NV[:, :V] / 2.0).softmax(1)
    for row in range(N):
        told = bool(unmatched.told_N[row])
        p_K = unmatched.p_NK[row].double()
        if not told and (settings.unaligned == "skip" or p_K[0] == 0):
            continue
        chosen = unmatched.lacking_V.clone() if told else torch.ones(V, dtype=torch.bool)
        if told:
            chosen[batch.labels_N[row]] = False
        q_K = q_NV[row][chosen].sort(descending=True).values[: settings.top_k]
        width = max(len(q_K), min(len(p_K), settings.top_k))
        p_K, q_K = (torch.nn.functional.pad(x[: settings.top_k], (0, width))[:width] for x in (p_K, q_K))
        total = total + (p_K - q_K).abs().sum()
    return total


@pytest.mark.parametrize(
    ("softcap", "more"), [(None, {}), (3.0, {"unaligned": "compare"}), (None, {"top_k": 4, "unaligned": "compare"})]
)
def test_loss_and_gradients_are_those_of_the_sorted_sum(
    softcap: float | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = UldConfig(temperature=2.0, **{"top_k": 9, **more})
    student, unmatched, batch = rows(softcap=softcap)
    leaves = [student.hidden_NH, student.head.weight_VH, student.head.bias_V]
    expected = naive(student, unmatched, batch, settings)
    wanted = torch.autograd.grad(expected, leaves)
    targets = Targets(rows=N, unmatched=unmatched)
    for chunk_bytes in (1 << 20, V * 8 * 4 * 2):  # all rows at once, and two a chunk
        monkeypatch.setattr(uld, "chunk_bytes_for", lambda *_, budget=chunk_bytes: budget)
        loss, figures = uld.Uld(settings)(student, targets, batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        for found, want in zip(torch.autograd.grad(loss * 3.0, leaves), wanted, strict=True):
            torch.testing.assert_close(found, want * 3.0, rtol=1e-7, atol=1e-12)
    assert float(figures[0]) == pytest.approx(float(unmatched.p_NK[unmatched.told_N].sum()))
    assert 0 < float(figures[1]) < int(unmatched.told_N.sum())


def test_a_student_that_has_the_sorted_probabilities_has_no_loss() -> None:
    """Whichever tokens have them, as sorted probabilities have no names; and bf16 weights learn too."""
    student, unmatched, batch = rows(torch.bfloat16)
    logits_NV = student.head.first_rows(V).logits(student.hidden_NH).detach()
    q_NV = (logits_NV / 2.0).softmax(1) * unmatched.lacking_V
    q_NV[torch.arange(N), batch.labels_N] = 0.0
    same = replace(unmatched, p_NK=q_NV.sort(1, descending=True).values, told_N=torch.ones(N, dtype=torch.bool))
    loss, _ = uld.Uld(UldConfig(temperature=2.0, top_k=V))(student, Targets(rows=N, unmatched=same), batch)
    assert loss.item() < 0.02 * N
    loss.backward()
    assert student.head.weight_VH.grad is not None and student.head.weight_VH.grad.dtype == torch.bfloat16


def test_it_is_refused_where_nothing_stays_without_a_match() -> None:
    objectives = [{"name": "token_divergence"}, {"name": "uld"}]
    with pytest.raises(ValidationError, match="list the teacher with the other one in teachers"):
        DistillConfig.model_validate({"objectives": objectives})
    teacher = {"name": "far", "path": "t"}
    with pytest.raises(ValidationError, match=r"teachers \(far\): the objective uld .*other_pieces: tail"):
        DistillConfig.model_validate({"objectives": objectives, "teachers": [teacher]})
    kept = {**teacher, "alignment": {"other_pieces": "tail"}}
    assert DistillConfig.model_validate({"objectives": objectives, "teachers": [kept]}).needs.unmatched
    with pytest.raises(ValidationError, match=r"does not give what the objectives need: .*that the student lacks"):
        DistillConfig.model_validate(
            {"objectives": objectives, "teachers": [{**kept, "teacher_placement": "endpoint"}]}
        )
