"""Mixture-of-experts layers: their modules, their units and their routing.

N tokens · n tokens of one expert · T experts a token · D hidden · F ffn units of one expert
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kdscale.families import Sites


class Routing(NamedTuple):
    """Which experts each token goes to (numbered as in their module), and the weight of each expert's output."""

    chosen_NT: Tensor
    weights_NT: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that `expert` gets, and its weight for each in fp32."""
        token_n, slot_n = torch.where(self.chosen_NT == expert)
        return token_n, self.weights_NT[token_n, slot_n].float()


def weighed(experts: Any, hidden_ND: Tensor, routing: Routing, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """(its tokens [n], what `expert` reads of them [n, D], what its output counts for each [n], fp32).

    Where the weight multiplies what an expert reads, its output counts as it is.
    """
    token_n, weight_n = routing.of(expert)
    read_nD = hidden_ND[token_n]
    if getattr(experts, "weighs_input", False):
        return token_n, read_nD * weight_n[:, None].to(read_nD.dtype), torch.ones_like(weight_n)
    return token_n, read_nD, weight_n


def weight_sums(experts: Any, routing: Routing) -> Tensor:
    """[N, 1] in fp32: what the outputs of a token's experts count together."""
    counted_NT = routing.weights_NT.float()
    counted_NT = torch.ones_like(counted_NT) if getattr(experts, "weighs_input", False) else counted_NT
    return counted_NT.sum(-1, keepdim=True)


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


def weigh_inputs(layer: nn.Module, sites: Sites) -> None:
    """Let a mixture whose experts read their input times its weight (Llama 4) be called as all others are.

    transformers gives each expert every token there, most of them times 0. From then on the router tells weights and
    experts, and the experts are given tokens, experts and weights; what leaves the mixture is the same.
    """
    block, router, experts = (layer.get_submodule(path) for path in (sites.mlp, sites.router, sites.experts))
    for module, own in ((block, _Mixture), (router, _Chooser), (experts, _WeighedInputs)):
        before: Any = type(module)
        module.__class__ = _of_class(own, before)
    parts = (router, experts, layer.get_submodule(sites.shared.rpartition(".")[0]))
    object.__setattr__(block, "parts", parts)  # not as modules, which it has under names of its own


@cache
def _of_class(own: Any, before: Any) -> Any:
    return type(before.__name__, (own, before), {})


class _Chooser(nn.Module):
    """Stands before a router's own class; `weight` and `top_k` are the router's."""

    weight: Tensor
    top_k: int

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE = nn.functional.linear(hidden_ND, self.weight)
        top_NT, chosen_NT = torch.topk(logits_NE, self.top_k, dim=-1)
        return logits_NE, torch.sigmoid(top_NT.float()).to(logits_NE.dtype), chosen_NT


class _WeighedInputs(nn.Module):
    """Stands before the own class of experts, whose weights are stored [input, output]."""

    weighs_input, is_transposed = True, True
    act_fn: nn.Module

    def _apply_gate(self, gate_up_nU: Tensor) -> Tensor:
        gate_nF, up_nF = gate_up_nU.chunk(2, dim=-1)
        units_nF: Tensor = up_nF * self.act_fn(gate_nF)
        return units_nF

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing, out_ND = Routing(top_k_index, top_k_weights), torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token_n, read_nD, _ = weighed(self, hidden_states, routing, expert)
            out_ND.index_add_(0, token_n, expert_output(self, expert, expert_units(self, expert, read_nD)))
        return out_ND


class _Mixture(nn.Module):
    """Stands before the own class of a mixture's block; `parts`: its router, experts and shared expert."""

    parts: tuple[nn.Module, nn.Module, nn.Module]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        router, experts, shared = self.parts
        hidden_ND = hidden_states.flatten(0, -2)
        logits_NE, weights_NT, chosen_NT = router(hidden_ND)
        return shared(hidden_ND) + experts(hidden_ND, chosen_NT, weights_NT), logits_NE


def router_tensor(router: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a router, by its path in it."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(router.get_submodule(path), leaf)
    return tensor


class RoutedLayer(Protocol):
    """A layer with a router (`DecoderLayer`); `router_axes` as `narrowed` takes them."""

    sites: Sites
    router_axes: dict[str, int]

    def site(self, path: str) -> nn.Module:
        """The module at a path within the layer."""


def routing_among_kept(layer: RoutedLayer, kept: Sequence[int], hidden_ND: Tensor) -> Routing:
    """Where the layer's router sends tokens when it can choose among the `kept` experts only, numbered as they are.

    This is the student's router: fewer rows, and the family's own rule for the weights of the chosen experts.
    """
    router = layer.site(layer.sites.router)
    with narrowed(router, layer.router_axes, kept) as tensors:
        _, weights_NT, chosen_NT = torch.func.functional_call(router, tensors, (hidden_ND,))
    return Routing(torch.tensor(kept, device=hidden_ND.device)[chosen_NT], weights_NT)
