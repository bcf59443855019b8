"""How far each layer's attention reaches, from a config.json: what its FLOPs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.family import Family

_SLIDES = "sliding_attention"  # an entry of transformers' lists of layer types


def attention_windows(family: Family, config: Mapping[str, Any]) -> list[int | None]:
    """Of each layer: how many positions a query sees at most, itself included; None: all before it.

    Raises CheckpointError for a window that is no positive number.
    """
    config = family.language(config)
    layers, rule = family.dims(config).layers, family.data.window
    if rule is None or (rule.only_with is not None and not config.get(rule.only_with, False)):
        return [None] * layers
    window = config.get(rule.field, rule.absent)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        where = f"{family.where}: {rule.field}"
        raise CheckpointError(where, expected="a positive number of positions, or null", got=repr(window)[:100])
    if rule.layers is None:
        return [window] * layers
    entry = next(entry for entry in family.data.layer_lists if entry.field == rule.layers)
    if (kinds := family.layer_list(entry, config, layers)) is not None:
        return [window if kind == _SLIDES else None for kind in kinds[:layers]]
    boundary = next(iter(family.data.layer_boundaries), None)
    first = 0 if boundary is None else config.get(boundary.field, boundary.absent)
    return [window if layer >= first else None for layer in range(layers)]
