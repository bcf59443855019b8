"""Preferences in fp64 against the loss written out with autograd, and what they are in simple cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdscale.config.distill.objectives import PreferenceConfig
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.preference import Preference
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch, most_answers
from kdscale.teacher.targets import LabelTargets, Targets
from tests.numerics.distill.objectives.shapes import LargestTensor

H, V, ROWS_OF_HEAD, SOFTCAP, S = 5, 11, 13, 4.0, 12
# rows of the answers of two sequences, by their number in the sequence; sequence 1 has one pair, sequence 0 two
SEQUENCE = torch.tensor([0] * 9 + [1] * 4)
NUMBER = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 0, 0, 0, 1])
N, PAIRS = len(SEQUENCE), [(0, 0), (0, 2), (1, 0)]


@pytest.fixture
def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = {
        "hidden_NH": (N, H), "weight_VH": (ROWS_OF_HEAD, H), "bias_V": (ROWS_OF_HEAD,), "teacher_N": (N,),
        "reference_N": (N,),
    }  # fmt: skip
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in random.items()}
    return {**found, "labels_N": torch.randint(V, (N,), generator=generator)}


def measured(settings: PreferenceConfig, values: dict[str, Tensor]) -> tuple[Tensor, list[float], list[Tensor]]:
    """(loss, terms, gradients of hidden states, weight and bias)."""
    leaves = [values[name].clone().requires_grad_() for name in ("hidden_NH", "weight_VH", "bias_V")]
    student = StudentOutput(leaves[0], OutputHead(leaves[1], leaves[2], SOFTCAP), V)
    ids = torch.zeros(2, S, dtype=torch.long)
    answers_N = SEQUENCE * most_answers(S) + NUMBER
    batch = MicroBatch(ids, ids, torch.arange(N), values["labels_N"], answers_N=answers_N)
    label, reference = (LabelTargets(values[name]) for name in ("teacher_N", "reference_N"))
    loss, terms = Preference(settings)(student, Targets(rows=N, label=label, reference=reference), batch)
    loss.backward()
    return loss.detach(), terms.tolist(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def written_out(settings: PreferenceConfig, values: dict[str, Tensor]) -> tuple[Tensor, list[float], list[Tensor]]:
    leaves = [values[name].clone().requires_grad_() for name in ("hidden_NH", "weight_VH", "bias_V")]
    logits_NV = SOFTCAP * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / SOFTCAP)
    logp_N = logits_NV[:, :V].log_softmax(1).gather(1, values["labels_N"][:, None])[:, 0]
    reference_N = values["reference_N"] if settings.reference == "start" else torch.zeros(N, dtype=torch.float64)
    beta_t = settings.beta if settings.teacher_beta is None else settings.teacher_beta

    def margin(values_N: Tensor, sequence: int, first: int) -> Tensor:
        of = [values_N[(sequence == SEQUENCE) & (first + side == NUMBER)] for side in (0, 1)]
        sums = [rows.mean() if settings.length_normalised else rows.sum() for rows in of]
        return sums[0] - sums[1]

    loss, terms = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for sequence, first in PAIRS:
        m = settings.beta * margin(logp_N - reference_N, sequence, first)
        t = beta_t * margin(values["teacher_N"] - reference_N, sequence, first)
        q = {"teacher": t.sigmoid(), "ranked": (t > 0).double(), "given": torch.ones(())}[settings.labels]
        q = (1 - settings.smoothing) * q + settings.smoothing * (1 - q)
        gamma = settings.target_margin
        loss = loss - q * logsigmoid(m - gamma) - (1 - q) * logsigmoid(-m - gamma)
        better, side = (first, 1.0) if q > 0.5 else (first + 1, -1.0)
        own = logp_N[(sequence == SEQUENCE) & (better == NUMBER)].mean()
        terms += torch.stack([(side * m > 0).double(), side * m, torch.maximum(q, 1 - q).double(), own]).detach()
    loss.backward()
    return loss.detach(), terms.tolist(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"labels": "teacher", "teacher_beta": 0.7, "beta": 0.3},
        {"labels": "ranked", "smoothing": 0.1},
        {"labels": "given", "beta": 2.0},
        {"labels": "given", "reference": "none", "length_normalised": True, "beta": 2.0, "target_margin": 0.5},
        {"labels": "teacher", "reference": "none", "length_normalised": True, "beta": 1.5},
    ],
)
def test_loss_terms_and_gradients_are_those_of_the_formula(values: dict[str, Tensor], settings: Any) -> None:
    entry = PreferenceConfig(**settings)
    loss, terms, gradients = measured(entry, values)
    expected, expected_terms, expected_gradients = written_out(entry, values)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    assert terms == pytest.approx(expected_terms, rel=1e-5)  # fp32
    for gradient, own in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, own, atol=1e-7, rtol=1e-6)  # by fp32 factors
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients)


def test_a_student_that_is_its_reference_has_log_2_a_pair_and_no_margin(values: dict[str, Tensor]) -> None:
    logits_NV = SOFTCAP * torch.tanh((values["hidden_NH"] @ values["weight_VH"].T + values["bias_V"]) / SOFTCAP)
    own_N = logits_NV[:, :V].log_softmax(1).gather(1, values["labels_N"][:, None])[:, 0]
    loss, terms, _ = measured(PreferenceConfig(labels="given"), {**values, "reference_N": own_N})
    assert float(loss) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert terms[1] == pytest.approx(0.0, abs=1e-6)


def test_a_student_with_its_teachers_margins_has_nothing_to_learn(values: dict[str, Tensor]) -> None:
    """With equal β the loss is least where the student is the teacher."""
    logits_NV = SOFTCAP * torch.tanh((values["hidden_NH"] @ values["weight_VH"].T + values["bias_V"]) / SOFTCAP)
    own_N = logits_NV[:, :V].log_softmax(1).gather(1, values["labels_N"][:, None])[:, 0]
    _, terms, gradients = measured(PreferenceConfig(), {**values, "teacher_N": own_N})
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in gradients)
    assert terms[0] == 3.0


def test_a_half_of_a_pair_counts_for_nothing(values: dict[str, Tensor]) -> None:
    kept = NUMBER[:9] != 3
    whole, part = dict(values), {
        name: value[:9][kept] if value.shape[0] == N else value for name, value in values.items()
    }  # fmt: skip
    ids, leaves = torch.zeros(2, S, dtype=torch.long), part["hidden_NH"].clone().requires_grad_()
    student = StudentOutput(leaves, OutputHead(whole["weight_VH"], whole["bias_V"], SOFTCAP), V)
    rows = int(kept.sum())
    batch = MicroBatch(ids, ids, torch.arange(rows), part["labels_N"], answers_N=NUMBER[:9][kept])
    targets = Targets(rows=rows, reference=LabelTargets(part["reference_N"]))
    loss, _ = Preference(PreferenceConfig(labels="given"))(student, targets, batch)
    loss.backward()
    assert leaves.grad is not None and float(leaves.grad[-1].abs().max()) == 0.0  # of answer 2, which is alone
    assert float(leaves.grad[0].abs().max()) > 0.0


def test_no_array_of_rows_by_vocabulary_is_made() -> None:
    rows, vocab, hidden = 4096, 6000, 8
    student = StudentOutput(
        torch.randn(rows, hidden, requires_grad=True), OutputHead(torch.randn(vocab, hidden, requires_grad=True)), vocab
    )
    ids = torch.zeros(1, rows, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.arange(rows), torch.arange(rows), answers_N=torch.arange(rows) * 2 // rows)
    with LargestTensor() as largest:
        loss, _ = Preference(PreferenceConfig(labels="given", reference="none"))(student, Targets(rows=rows), batch)
        loss.backward()
    assert largest.values < rows * vocab / 4
