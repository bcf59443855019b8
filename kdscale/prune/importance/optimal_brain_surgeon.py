"""Which units to remove when the rest may be refitted: structured Optimal Brain Surgeon on one linear layer's input.

Removing the units R of y = W x and refitting the rest costs, over the calibration tokens,

    E(R) = tr(W_R ([G⁻¹]_RR)⁻¹ W_Rᵀ),   G = Σ x xᵀ + λI

(Hassibi and Stork 1993; SparseGPT, arXiv 2301.00774, for whole columns). A unit that others can stand in for is cheap
however strong it is: output energy alone does not know that. Units go greedily, the cheapest first, each time with W
and G⁻¹ as they are after the removals before: the order is one for every target size, and is what is stored.

D outputs · U inputs · B units removed together · W weight [D, U]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdscale.errors import SelfCheckError

# Units taken in one step: their joint removal is exact, only their choice is as of the step's start.
_BLOCKS = 96


@contextmanager
def explain_singular(what: str) -> Iterator[None]:
    """Turn a factorisation or solution that fails in the block into a SelfCheckError about `what`."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise SelfCheckError(
            f"importance {what} cannot be computed",
            expected="sums over the calibration tokens that are finite and can be inverted",
            got=str(error).splitlines()[0],
            hint="raise prune.ridge_lambda, try importance.dtype=float32, or choose another method than obs",
        ) from error


def removal_costs(gram_UU: Tensor, weight_DU: Tensor, ridge: float) -> Tensor:
    """A score for each unit, fp64 [U], whose order (smallest first) is that of removal; the shares add up.

    A unit's score is what its removal adds to E, raised to at least that of every unit removed before it (a later
    removal can be cheaper than an earlier one by rounding or by the choice of blocks). So the sum over the kept units
    is the part of the layer's output that they still hold. `gram_UU` is not changed; `ridge` is λ as a share of its
    mean diagonal. Raises torch.linalg.LinAlgError when G is not finite (`explain_singular` is for that).
    """
    units = gram_UU.shape[0]
    if float(gram_UU.diagonal().mean()) == 0.0:  # a layer that never fired: any order will do
        return torch.zeros(units, dtype=torch.float64, device=gram_UU.device)
    inverse_UU, weight_DU = _inverse(gram_UU, ridge), weight_DU.to(torch.float32, copy=True)
    alive = torch.ones(units, dtype=torch.bool, device=gram_UU.device)
    costs = torch.zeros(units, dtype=torch.float64, device=gram_UU.device)
    step, floor, left = max(units // _BLOCKS, 1), 0.0, units
    while left:
        each_U = weight_DU.square().sum(0) / inverse_UU.diagonal()
        each_U[~alive] = torch.inf
        taken = torch.argsort(each_U, stable=True)[: min(step, left)]
        added = _remove(inverse_UU, weight_DU, taken)
        alive[taken] = False
        left -= len(taken)
        # One joint cost, spread over the block as its units' own costs are.
        own = each_U[taken].double()
        total = own.sum()
        spread = added * own / total if float(total) > 0 else torch.full_like(own, added / len(taken))
        for unit, cost in zip(taken.tolist(), spread.tolist(), strict=True):
            # 1e-6 keeps the order of equals through the fp32 of the file
            floor = max(cost, floor * (1 + 1e-6))
            costs[unit] = floor
    return costs


def head_removal_costs(gram_UU: Tensor, weight_DU: Tensor, ridge: float, kv_heads: int, head_dim: int) -> Tensor:
    """The same for whole query heads (`head_dim` inputs each), fp64 [heads].

    One head of each kv group goes in turn, so that every group has removed as many at any time; which, and in which
    order of groups, is decided by the joint cost.
    """
    heads = gram_UU.shape[0] // head_dim
    costs = torch.zeros(heads, dtype=torch.float64, device=gram_UU.device)
    if float(gram_UU.diagonal().mean()) == 0.0:
        return costs
    inverse_UU, weight_DU = _inverse(gram_UU, ridge), weight_DU.to(torch.float32, copy=True)
    group, gone, floor = heads // kv_heads, set[int](), 0.0
    for _ in range(group):
        waiting = set(range(kv_heads))
        while waiting:
            candidates = [h for h in range(heads) if h not in gone and h // group in waiting]
            each = {h: _joint_cost(inverse_UU, weight_DU, _inputs(h, head_dim)) for h in candidates}
            head = min(candidates, key=lambda h: (each[h], h))
            _remove(inverse_UU, weight_DU, torch.tensor(_inputs(head, head_dim), device=gram_UU.device))
            gone.add(head)
            waiting.discard(head // group)
            floor = max(each[head], floor * (1 + 1e-6))
            costs[head] = floor
    return costs


def _inputs(head: int, head_dim: int) -> list[int]:
    return list(range(head * head_dim, (head + 1) * head_dim))


def _inverse(gram_UU: Tensor, ridge: float) -> Tensor:
    """(G + λI)⁻¹ in fp32, factorised in fp64: the fp32 sums' own error is far below λ."""
    damped = gram_UU.double()
    damped.diagonal().add_(ridge * gram_UU.diagonal().double().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()


def _joint_cost(inverse_UU: Tensor, weight_DU: Tensor, units: list[int]) -> float:
    """tr(W_B ([G⁻¹]_BB)⁻¹ W_Bᵀ)."""
    weight_DB = weight_DU[:, units].double()
    solved_BD = torch.linalg.solve(inverse_UU[units][:, units].double(), weight_DB.T)
    return float((weight_DB.T * solved_BD).sum())


def _remove(inverse_UU: Tensor, weight_DU: Tensor, units: Tensor) -> float:
    """Take `units` out of both, in place, refitting the rest; returns the cost. Their rows become those of identity."""
    rows_BU = inverse_UU[units]
    weight_DB = weight_DU[:, units]
    solved_BU = torch.linalg.solve(rows_BU[:, units].double(), rows_BU.double()).float()
    solved_BD = torch.linalg.solve(rows_BU[:, units].double(), weight_DB.double().T)
    cost = float((weight_DB.double().T * solved_BD).sum())
    weight_DU.addmm_(weight_DB, solved_BU, alpha=-1)
    inverse_UU.addmm_(rows_BU.T, solved_BU, alpha=-1)
    inverse_UU[units] = 0
    inverse_UU[:, units] = 0
    inverse_UU[units, units] = 1
    weight_DU[:, units] = 0
    return max(cost, 0.0)
