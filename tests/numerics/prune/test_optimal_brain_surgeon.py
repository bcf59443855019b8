"""Removal costs against their definition: the least error that refitting the kept units can leave, by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdscale.prune.importance.optimal_brain_surgeon import head_removal_costs, removal_costs

RIDGE = 1e-3


def _problem(units: int, outputs: int, seed: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs of uneven strength, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or units, units, generator=generator, dtype=torch.float64)
    mix *= torch.logspace(0, -1.5, units, dtype=torch.float64)
    x = torch.randn(400, rank or units, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x, torch.randn(outputs, units, generator=generator, dtype=torch.float64)


def _error(gram: torch.Tensor, weight: torch.Tensor, removed: list[int]) -> float:
    """E(R) from the normal equations of the kept units, fp64: nothing of obs.py's inverse and downdates."""
    damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    kept = [unit for unit in range(len(gram)) if unit not in removed]
    change = weight.new_zeros(weight.shape)
    change[:, removed] = -weight[:, removed]
    if kept:
        target = weight[:, removed] @ damped[removed][:, kept]
        change[:, kept] = torch.linalg.solve(damped[kept][:, kept], target.T).T
    return float(torch.einsum("du,uv,dv->", change, damped, change))


def test_each_removal_is_the_cheapest_one_left():
    gram, weight = _problem(24, 10, seed=0)
    costs = removal_costs(gram.float(), weight.float(), RIDGE)
    order = torch.argsort(costs, stable=True).tolist()
    gone: list[int] = []
    for unit in order:
        before = _error(gram, weight, gone)
        each = {other: _error(gram, weight, [*gone, other]) - before for other in range(24) if other not in gone}
        assert each[unit] <= min(each.values()) * (1 + 1e-3)
        gone.append(unit)


def test_costs_add_up_to_the_least_error():
    gram, weight = _problem(24, 10, seed=1)
    costs = removal_costs(gram.float(), weight.float(), RIDGE)
    order = torch.argsort(costs, stable=True).tolist()
    for count in (6, 12, 18):
        # at least, as a cost is raised to those before it; and by no more than a tenth here
        error = _error(gram, weight, order[:count])
        assert error * (1 - 1e-3) <= float(costs[order[:count]].sum()) <= 1.1 * error


def test_a_unit_that_others_replace_goes_first_however_strong():
    gram, weight = _problem(12, 8, seed=2)
    mix = torch.eye(12, dtype=torch.float64)
    mix[:, 3] = 5 * (mix[:, 1] + mix[:, 2])  # unit 3 repeats two others, louder than all
    gram = mix.T @ gram @ mix
    assert int(removal_costs(gram.float(), weight.float(), 1e-6).argmin()) in (1, 2, 3)
    energy = gram.diagonal() * weight.square().sum(0)
    assert int(energy.argmax()) == 3


def test_units_taken_together_cost_little_more_than_one_by_one(monkeypatch):
    gram, weight = _problem(192, 40, seed=3)
    order = torch.argsort(removal_costs(gram.float(), weight.float(), RIDGE), stable=True).tolist()
    monkeypatch.setattr("kdscale.prune.importance.optimal_brain_surgeon._BLOCKS", 192)
    single = torch.argsort(removal_costs(gram.float(), weight.float(), RIDGE), stable=True).tolist()
    assert _error(gram, weight, order[:96]) <= 1.02 * _error(gram, weight, single[:96])
    energy = torch.argsort(gram.diagonal() * weight.square().sum(0)).tolist()
    assert _error(gram, weight, single[:96]) < _error(gram, weight, energy[:96])


def test_heads_leave_each_group_in_turn_and_cheapest_first():
    kv_heads, group, width = 2, 3, 4
    gram, weight = _problem(kv_heads * group * width, 10, seed=4)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    gram, weight = gram[shuffle][:, shuffle], weight[:, shuffle]
    costs = head_removal_costs(gram.float(), weight.float(), RIDGE, kv_heads, width)
    order = torch.argsort(costs, stable=True).tolist()
    assert [sorted(head // group for head in order[i : i + 2]) for i in (0, 2, 4)] == [[0, 1]] * 3
    inputs = {head: list(range(head * width, (head + 1) * width)) for head in range(6)}
    least = min(range(6), key=lambda head: _error(gram, weight, inputs[head]))
    assert order[0] == least
    pairs = [_error(gram, weight, inputs[a] + inputs[b]) for a, b in itertools.product(range(3), range(3, 6))]
    assert _error(gram, weight, inputs[order[0]] + inputs[order[1]]) <= sorted(pairs)[1]


@pytest.mark.parametrize("rank", [3, 1])
def test_fewer_tokens_than_units_and_silent_layers(rank):
    gram, weight = _problem(16, 4, seed=6, rank=rank)
    costs = removal_costs(gram.float(), weight.float(), 1e-2)
    assert torch.isfinite(costs).all() and (costs >= 0).all()
    assert torch.equal(removal_costs(torch.zeros(16, 16), weight.float(), 1e-2), torch.zeros(16, dtype=torch.float64))
    silent = head_removal_costs(torch.zeros(16, 16), weight.float(), 1e-2, 2, 4)
    assert torch.equal(silent, torch.zeros(4, dtype=torch.float64))


def test_the_order_survives_the_files_precision():
    gram, weight = torch.eye(64), torch.ones(4, 64)  # all equal: the floor alone orders them
    costs = removal_costs(gram, weight, RIDGE)
    assert len(set(costs.float().tolist())) == 64
