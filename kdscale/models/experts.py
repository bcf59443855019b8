"""Mixture-of-experts layers: their modules, their units and their routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """Which experts a token goes to, by the numbers of the module that they are in, and what each counts."""

    chosen_NT: Tensor
    weights_NT: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(the tokens that `expert` gets, its weight for each in fp32)"""
        token_n, slot_n = torch.where(self.chosen_NT == expert)
        return token_n, self.weights_NT[token_n, slot_n].float()


def experts_call(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Routing]:
    """What a module of experts is called with: (hidden_ND, who goes where)."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args, strict=False)) | kwargs
    return given[names[0]], Routing(given[names[1]], given[names[2]])


def expert_units(experts: Any, expert: int, hidden_nD: Tensor) -> Tensor:
    """What the down projection of `expert` reads: [n, F]."""
    units: Tensor = experts._apply_gate(nn.functional.linear(hidden_nD, experts.gate_up_proj[expert]))
    return units


def routing_among_kept(router: nn.Module, kept: Sequence[int], hidden_ND: Tensor) -> Routing:
    """Where the router sends tokens when it has only the `kept` experts to choose from, by the teacher's numbers.

    It is the student's router: fewer rows, and the family's own rule for what the chosen ones count.
    """
    weight: Any = router.weight
    numbers = torch.tensor(kept, device=hidden_ND.device)
    _, weights_NT, chosen_NT = torch.func.functional_call(router, {"weight": weight[numbers]}, (hidden_ND,))
    return Routing(numbers[chosen_NT], weights_NT)
