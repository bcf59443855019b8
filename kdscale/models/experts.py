"""Mixture-of-experts layers: their modules, their units and their routing.

N tokens · n tokens of one expert · T experts a token · D hidden · F ffn units of one expert
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """Which experts each token goes to (numbered as in their module), and the weight of each expert's output."""

    chosen_NT: Tensor
    weights_NT: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that `expert` gets, and its weight for each in fp32."""
        token_n, slot_n = torch.where(self.chosen_NT == expert)
        return token_n, self.weights_NT[token_n, slot_n].float()


def experts_call(args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Routing]:
    """What transformers calls a module of experts with: (hidden_ND, routing)."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    call = dict(zip(names, args, strict=False)) | kwargs
    return call[names[0]], Routing(call[names[1]], call[names[2]])


def expert_units(experts: Any, expert: int, hidden_nD: Tensor) -> Tensor:
    """What the down projection of `expert` reads for these tokens: [n, F]."""
    units: Tensor = experts._apply_gate(nn.functional.linear(hidden_nD, experts.gate_up_proj[expert]))
    return units


def routing_among_kept(router: nn.Module, kept: Sequence[int], hidden_ND: Tensor) -> Routing:
    """Where the router sends tokens when it can choose among the `kept` experts only, numbered as in the teacher.

    This is the student's router: fewer rows, and the family's own rule for the weights of the chosen experts.
    """
    weight: Any = router.weight
    numbers = torch.tensor(kept, device=hidden_ND.device)
    _, weights_NT, chosen_NT = torch.func.functional_call(router, {"weight": weight[numbers]}, (hidden_ND,))
    return Routing(numbers[chosen_NT], weights_NT)
