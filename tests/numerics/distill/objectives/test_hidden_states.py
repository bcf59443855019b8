"""The objective `hidden_states` beside a twin in fp64, and where its projection starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdscale.config.distill.layer_objectives import HiddenStatesConfig
from kdscale.config.distill.objective import ModelPair
from kdscale.distill.objectives import blockwise
from kdscale.distill.objectives.base import StudentOutput
from kdscale.distill.objectives.hidden_states import HiddenStates
from kdscale.models.head import OutputHead
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets

N, H, G = 11, 6, 10


def pair(student_hidden=H, **known):
    return ModelPair(4, 2, G, student_hidden, (8, 8), **known)


def loss_of(objective, layers_NH, hidden_NG):
    rows = torch.arange(N)
    student = StudentOutput(torch.empty(0, 1), OutputHead(torch.empty(1, 1)), 1, layers_NH=layers_NH)
    return objective(student, Targets(rows=N, hidden_NG=hidden_NG), MicroBatch(rows[None], rows[None], rows, rows))


@pytest.mark.parametrize("values", [1 << 20, 2 * G])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
@pytest.mark.parametrize("width", [H, G])
def test_it_is_the_twin_in_any_blocks(distance, width, values, monkeypatch):
    monkeypatch.setitem(blockwise._VALUES, "cpu", values)
    generator = torch.Generator().manual_seed(0)
    own = {layer: torch.randn(N, width, generator=generator, dtype=torch.float64).requires_grad_() for layer in (-1, 1)}
    teacher = {layer: torch.randn(N, G, generator=generator, dtype=torch.float64) for layer in (-1, 3)}
    objective = HiddenStates(HiddenStatesConfig(distance=distance, layers={-1: -1, 1: 3}), pair(width)).double()
    loss, terms = loss_of(objective, own, teacher)
    errors, cosines = 0.0, 0.0
    for ours, theirs in ((-1, -1), (1, 3)):
        state = own[ours] if width == G else own[ours] @ objective.projection.weight.T
        errors = errors + ((state - teacher[theirs]).norm(dim=1) / teacher[theirs].norm(dim=1)).square().sum() / 2
        dot = (state * teacher[theirs]).sum(1)
        cosines = cosines + (dot / state.norm(dim=1) / teacher[theirs].norm(dim=1)).sum() / 2
    want = errors if distance == "mse" else N - cosines
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms, torch.stack([errors, cosines]).detach().float())
    inputs = [*own.values(), *objective.parameters()]
    for got, expected in zip(torch.autograd.grad(2 * loss, inputs), torch.autograd.grad(2 * want, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_projection_starts_from_what_pruning_kept():
    """A student that only lost channels is already where the teacher's kept channels are."""
    kept = [0, 2, 3, 6, 8, 9]
    basis_HG = np.eye(G, dtype=np.float32)[kept]
    objective = HiddenStates(HiddenStatesConfig(layers={1: 3}), pair(basis_HG=basis_HG))
    hidden_NG = torch.zeros(N, G)
    hidden_NG[:, kept] = torch.randn(N, H, generator=torch.Generator().manual_seed(0))
    loss, terms = loss_of(objective, {1: hidden_NG[:, kept].clone().requires_grad_()}, {3: hidden_NG})
    assert float(loss.detach()) == 0.0
    assert float(terms[1]) == pytest.approx(N)


def test_a_projection_that_starts_from_nothing_keeps_lengths_and_is_always_the_same():
    one, two = (HiddenStates(HiddenStatesConfig(layers={1: 3}), pair()).projection.weight for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.T @ one, torch.eye(H))
