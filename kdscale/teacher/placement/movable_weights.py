"""The weights of a teacher that can be kept elsewhere: its decoder layers, its embedding table and its head's.

The others (final norm, learned positions, a norm after the embedding) are small and stay on every rank.

V vocabulary (rows of a table), R rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import move_buffers, replace_parameters

# Values: kernels choose their code by alignment, and a view must give the bits that a separate tensor gives.
_ALIGN = 64


def aligned(values: int) -> int:
    """The number of values rounded up to the alignment."""
    return -(-values // _ALIGN) * _ALIGN


@dataclass(frozen=True)
class _Slot:
    """Values `begin` to `end` of a layer belong to this parameter."""

    parameter: nn.Parameter
    name: str
    shape: torch.Size
    begin: int
    end: int


@dataclass
class MovableLayer:
    """One decoder layer whose parameters lie behind each other in one flat tensor of `numel` values."""

    module: nn.Module
    slots: list[_Slot] = field(default_factory=list)
    numel: int = 0

    def add(self, name: str, parameter: nn.Parameter, shape: torch.Size) -> None:
        """Append a parameter, aligned."""
        begin = aligned(self.numel)
        self.numel = begin + shape.numel()
        self.slots.append(_Slot(parameter, name, shape, begin, self.numel))

    def fill(self, weights: ParameterReader, begin: int, out: torch.Tensor) -> None:
        """Read values `begin` to `begin + len(out)` into `out`; gaps between parameters are left as they are."""
        for slot in self.slots:
            low, high = max(begin, slot.begin), min(begin + out.numel(), slot.end)
            if low < high:
                weights.fill(slot.name, low - slot.begin, out[low - begin : high - begin])

    def attach(self, flat: torch.Tensor) -> None:
        """Point the module's parameters at the layer's values."""
        for slot in self.slots:
            slot.parameter.data = flat[slot.begin : slot.end].view(slot.shape)

    def detach(self, empty: torch.Tensor) -> None:
        """Take the values away from the module's parameters."""
        for slot in self.slots:
            slot.parameter.data = empty


@dataclass(eq=False)
class MovableTable:
    """The table [V,H] of an embedding or a head: looked up by rows, or needed whole."""

    parameter: nn.Parameter
    name: str
    vocab: int
    width: int

    def fill(self, weights: ParameterReader, first: int, out_RH: torch.Tensor) -> None:
        """Read rows `first` to `first + R`; rows past the table's end are left as they are."""
        rows = max(0, min(self.vocab - first, out_RH.shape[0]))
        if rows:
            weights.fill(self.name, first * self.width, out_RH[:rows].view(-1))


@dataclass(frozen=True)
class MovableWeights:
    """What can be kept elsewhere. `head` is None when it stays; `embed` too when the head is the same table."""

    layers: list[MovableLayer]
    embed: MovableTable | None
    head: MovableTable | None

    @property
    def tables(self) -> list[MovableTable]:
        """Every table once; a tied head's is the embedding's."""
        return list(dict.fromkeys(table for table in (self.embed, self.head) if table is not None))


def make_movable(model: Any, weights: ParameterReader, device: torch.device, keep_head: bool) -> MovableWeights:
    """Put empty parameters into a skeleton's layers and tables, and load all that stays on every rank.

    `keep_head`: the head's weight stays too, for targets that refer to it.
    """
    shapes = {name: (value.shape, value.dtype) for name, value in model.named_parameters()}
    parameters = replace_parameters(
        model, lambda value: nn.Parameter(torch.empty(0, dtype=value.dtype, device=device), requires_grad=False)
    )
    sites = weights.family.sites
    embed_weight, head_weight = (model.get_submodule(path).weight for path in (sites.embed, sites.head))
    movable = [weight for weight in (embed_weight, head_weight) if not (keep_head and weight is head_weight)]
    layers = [MovableLayer(module) for module in model.get_submodule(sites.layers)]
    tables: dict[int, MovableTable] = {}
    for name, parameter in parameters.items():
        shape, dtype = shapes[name]
        if name.startswith(f"{sites.layers}."):
            index = int(name.removeprefix(f"{sites.layers}.").partition(".")[0])
            layers[index].add(name, parameter, shape)
        elif any(parameter is weight for weight in movable):
            tables[id(parameter)] = MovableTable(parameter, name, shape[0], shape[1])
        else:
            flat = torch.empty(shape.numel(), dtype=dtype, device=device)
            weights.fill(name, 0, flat)
            parameter.data = flat.view(shape)
    move_buffers(model, device)
    return MovableWeights(layers, tables.get(id(embed_weight)), tables.get(id(head_weight)))
