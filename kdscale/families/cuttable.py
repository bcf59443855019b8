"""What of a model can be cut: which axes, and which only together with another (`kdscale families` lists them); and
with which layers a student may end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdscale.errors import ConfigError
from kdscale.families.dims import SHAPE_AXES
from kdscale.families.family import Family
from kdscale.families.layer_kinds import lacking_sources
from kdscale.families.schema import FamilyData


def cuttable_axes(data: FamilyData) -> dict[str, str]:
    """Each axis that models of the family have → "alone", or the axis that it is cut together with.

    Without a config field for head_dim, which never changes, the hidden size follows the heads; without a field for kv
    heads they are as many as the query heads, and so they are where a constraint says so (latent attention).
    """
    axes: dict[str, str] = {axis: "alone" for axis in SHAPE_AXES if axis in data.dims and axis not in data.uncut}
    if data.dims["head_dim"].field is None:
        axes |= {"hidden": "heads", "heads": "hidden"}
    one_axis = any((rule.dim, rule.equals) == ("kv_heads", "heads") for rule in data.constraints)
    if one_axis or data.dims["kv_heads"].field is None:
        axes |= {"kv_heads": "heads"} if axes["heads"] != "alone" else {"heads": "kv_heads", "kv_heads": "heads"}
    return axes


def may_end(family: Family, config: Mapping[str, Any]) -> list[bool]:
    """Of each layer, whether a student may end with it (see `LayerList.last`)."""
    layers = family.dims(config).layers
    lists = [(e.last, family.layer_list(e, config, layers)) for e in family.data.layer_lists if e.last is not None]
    return [all(values is None or values[layer] == last for last, values in lists) for layer in range(layers)]


Lacks = Callable[[Sequence[int]], list[list[int]]]


def sources_lacking(family: Family, config: Mapping[str, Any]) -> Lacks:
    """A function of kept layers: for each layer that others lack because they would read its keys and values, all that
    would do."""
    kinds, data = family.layer_kinds(config), family.data

    def lacks(kept: Sequence[int]) -> list[list[int]]:
        wanted = lacking_sources(data, [kinds[layer] for layer in kept])
        return [[layer for layer, each in enumerate(kinds) if each == one] for one in wanted]

    return lacks


def with_sources(
    kept: Sequence[int], lacks: Lacks, ends: Callable[[int], bool], score: Callable[[int], float]
) -> list[int]:
    """`kept` with the best layers that others lack in the place of the weakest that they can do without.

    `ends`: whether a student may end with a layer. Raises ConfigError where the layers are too few for that.
    """
    layers = list(kept)
    while missing := lacks(layers):
        best = max(missing[0], key=score)
        swaps = (sorted({*layers, best} - {weak}) for weak in sorted(layers, key=score))
        better = next((swap for swap in swaps if len(lacks(swap)) < len(missing) and ends(swap[-1])), None)
        if better is None:
            raise ConfigError("prune.layers", expected="layers for others to read from", got=f"only {len(layers)}")
        layers = better
    return layers


def ending_well(family: Family, config: Mapping[str, Any], kept: Sequence[int]) -> list[int]:
    """`kept` with the model's last layer in the place of a last one that no student may end with, and with layers whose
    keys and values others read in the place of later ones."""
    ends = may_end(family, config)
    kept = list(kept) if ends[kept[-1]] else [*kept[:-1], family.dims(config).layers - 1]
    return with_sources(kept, sources_lacking(family, config), ends.__getitem__, lambda layer: -layer)
