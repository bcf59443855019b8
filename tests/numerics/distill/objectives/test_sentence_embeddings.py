"""The objective `sentence_embeddings` beside a twin in fp64 that is written out sentence by sentence."""

from __future__ import annotations

import pytest
import torch

from kdscale.config.distill.encoder_objectives import SentenceEmbeddingsConfig
from kdscale.config.distill.objective import ModelPair
from kdscale.config.distill.targets import FINAL
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.sentence_embeddings import SentenceEmbeddings
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets

G = 10
LENGTHS = [[5, 3, 1, 1], [4, 6]]  # the single positions are padding
SENTENCES = [(0, 5), (5, 8), (10, 14), (14, 20)]


def batch_of() -> MicroBatch:
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    rows = torch.cat([torch.arange(*span) for span in SENTENCES])
    return MicroBatch(torch.zeros_like(positions), positions, rows, torch.zeros_like(rows))


def pair(student_hidden: int, **known) -> ModelPair:
    return ModelPair(4, 2, G, student_hidden, (8, 8), **known)


def states(seed: int, width: int) -> torch.Tensor:
    return torch.randn(20, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def twin(own_TH, teacher_TG, pooling: str, weight: float, projection=None):
    ours, projected, theirs = [], [], []
    for begin, end in SENTENCES:
        one, other = (x[begin] if pooling == "cls" else x[begin:end].mean(0) for x in (own_TH, teacher_TG))
        projected.append(unit(one if projection is None else projection @ one))
        ours.append(unit(one))
        theirs.append(unit(other))
    loss = cosine = error = 0.0
    for i, (begin, end) in enumerate(SENTENCES):
        gaps = [(ours[i] @ ours[j] - theirs[i] @ theirs[j]) ** 2 for j in range(len(SENTENCES))]
        own_error, own_cosine = sum(gaps) / len(gaps), projected[i] @ theirs[i]
        loss = loss + (end - begin) * (1 - own_cosine + weight * own_error)
        cosine, error = cosine + (end - begin) * own_cosine, error + (end - begin) * own_error
    return loss, torch.stack([cosine, error])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("width", [6, G])
def test_it_is_the_twin(width: int, pooling: str) -> None:
    own_TH, teacher_TG, batch = states(1, width).requires_grad_(), states(2, G), batch_of()
    objective = SentenceEmbeddings(
        SentenceEmbeddingsConfig(pooling=pooling, similarity_weight=3.0), pair(width)
    ).double()
    student = StudentOutput(
        torch.empty(0, 1), OutputHead(torch.empty(1, 1)), 1, layers_NH={FINAL: own_TH[batch.rows_N]}
    )
    loss, terms = objective(student, Targets(rows=18, hidden_NG={FINAL: teacher_TG[batch.rows_N]}), batch)
    projection = None if width == G else objective.projection.weight
    want, want_terms = twin(own_TH, teacher_TG, pooling, 3.0, projection)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.double(), want_terms, rtol=1e-5, atol=1e-5)
    inputs = [own_TH, *objective.parameters()]
    for got, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_pooling_is_the_teachers_own_where_its_files_say_so() -> None:
    entry = SentenceEmbeddingsConfig()
    assert entry.settled(pair(G, pooling="cls"), 10).pooling == "cls"
    assert entry.settled(pair(G), 10).pooling == "mean"
    assert SentenceEmbeddingsConfig(pooling="mean").settled(pair(G, pooling="cls"), 10).pooling == "mean"
