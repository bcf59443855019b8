"""Which axes of a family can be cut, and which only together with another: what `kdscale families` lists."""

from __future__ import annotations

from kdscale.families.dims import SHAPE_AXES
from kdscale.families.schema import FamilyData


def cuttable_axes(data: FamilyData) -> dict[str, str]:
    """Each axis that models of the family have → "alone", or the axis that it is cut together with.

    Without a config field for head_dim, which never changes, the hidden size follows the heads; without a field for kv
    heads they are as many as the query heads, and so they are where a constraint says so (latent attention).
    """
    axes: dict[str, str] = {axis: "alone" for axis in SHAPE_AXES if axis in data.dims}
    if data.dims["head_dim"].field is None:
        axes |= {"hidden": "heads", "heads": "hidden"}
    one_axis = any((rule.dim, rule.equals) == ("kv_heads", "heads") for rule in data.constraints)
    if one_axis or data.dims["kv_heads"].field is None:
        axes |= {"kv_heads": "heads"} if axes["heads"] != "alone" else {"heads": "kv_heads", "kv_heads": "heads"}
    return axes
