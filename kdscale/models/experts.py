"""Mixture-of-experts layers: their modules, their units and their routing.

N tokens · n tokens of one expert · T experts a token · D hidden · F ffn units of one expert
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdscale.models.layer_stream import DecoderLayer


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
    gated = getattr(experts, "has_gate", True)  # else there is no gate, and the activation follows at once
    into, bias = experts.gate_up_proj if gated else experts.up_proj, None
    if getattr(experts, "has_bias", False):
        bias = (experts.gate_up_proj_bias if gated else experts.up_proj_bias)[expert]
    read_nU = nn.functional.linear(hidden_nD, _outputs_first(experts, into[expert]), bias)
    units_nF: Tensor = experts._apply_gate(read_nU) if gated else experts.act_fn(read_nU)
    return units_nF


def down_weight(experts: Any, expert: int) -> Tensor:
    """The down projection of `expert`, [D, F]: a view."""
    return _outputs_first(experts, experts.down_proj[expert])


def expert_output(experts: Any, expert: int, units_nF: Tensor) -> Tensor:
    """What `expert` puts out for its units: [n, D]."""
    bias = experts.down_proj_bias[expert] if getattr(experts, "has_bias", False) else None
    return nn.functional.linear(units_nF, down_weight(experts, expert), bias)


def _outputs_first(experts: Any, weight: Tensor) -> Tensor:
    """[outputs, inputs] of one expert's weight, which some modules keep the other way round."""
    return weight.T if getattr(experts, "is_transposed", False) else weight


@contextmanager
def narrowed(router: Any, along: Mapping[str, int], kept: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Within the block the router takes itself for one of the `kept` experts; gives the tensors that it then has.

    `along`: the dimension of each of its tensors that counts experts (`DecoderLayer.router_axes`).
    """
    device = next(router.parameters()).device
    numbers, before = torch.tensor(kept, device=device), getattr(router, "num_experts", None)
    if before is not None:
        router.num_experts = len(kept)
    try:
        yield {name: router_tensor(router, name).index_select(dim, numbers) for name, dim in along.items()}
    finally:
        if before is not None:
            router.num_experts = before


def router_tensor(router: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a router, by its path in it."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(router.get_submodule(path), leaf)
    return tensor


def routing_among_kept(layer: DecoderLayer, kept: Sequence[int], hidden_ND: Tensor) -> Routing:
    """Where the layer's router sends tokens when it can choose among the `kept` experts only, numbered as they are.

    This is the student's router: fewer rows, and the family's own rule for the weights of the chosen experts.
    """
    router = layer.site(layer.sites.router)
    with narrowed(router, layer.router_axes, kept) as tensors:
        _, weights_NT, chosen_NT = torch.func.functional_call(router, tensors, (hidden_ND,))
    return Routing(torch.tensor(kept, device=hidden_ND.device)[chosen_NT], weights_NT)
