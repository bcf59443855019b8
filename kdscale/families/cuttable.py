"""What of a model can be cut: which axes, and which only together with another (`kdscale families` lists them); and
with which layers a student may end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.families.dims import SHAPE_AXES
from kdscale.families.family import Family
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


def ending_well(family: Family, config: Mapping[str, Any], kept: Sequence[int]) -> list[int]:
    """`kept` with the model's last layer in the place of a last one that no student may end with."""
    return list(kept) if may_end(family, config)[kept[-1]] else [*kept[:-1], family.dims(config).layers - 1]
