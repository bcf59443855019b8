"""What a config.json says where a family's file tells to look, one with other sizes, and tensors' names in the file."""

from __future__ import annotations

import copy
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.dims import Dims
from kdscale.families.layer_fields import Config, listed, product_of
from kdscale.families.schema import FamilyData


def flag_of(data: FamilyData, config: Config, name: str, where: str) -> bool:
    """One of the family's flags. Raises CheckpointError naming `where` for a value that is neither true nor false."""
    flag = data.flags[name]
    if flag.is_set:
        return bool(config[flag.field]) if flag.field in config else flag.absent
    value = config.get(flag.field, flag.absent)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {flag.field}", expected="true or false", got=repr(value))
    return value


def is_about(data: FamilyData, config: Config, where: str) -> bool:
    """Whether a file is about this config of its model type. Raises CheckpointError for a list that is none."""
    rule = data.chosen
    if rule is None:
        return True
    if rule.entry is None:
        return bool(config.get(rule.field, rule.absent)) == rule.holds
    values = listed(next(entry for entry in data.layer_lists if entry.field == rule.field), config, where)
    return (isinstance(values, list) and rule.entry in values) == rule.holds


def first_position(data: FamilyData, config: Config) -> int:
    """The row of the learned positions that a document's first token has; 0 without learned positions."""
    field = data.sizes["positions"].begins_after if "positions" in data.sizes else None
    last = config.get(field) if field is not None else None
    return last + 1 if isinstance(last, int) else 0


def with_sizes(data: FamilyData, config: Config, dims: Dims) -> dict[str, Any]:
    """The config with `dims` in the fields that say sizes."""
    out = copy.deepcopy(dict(config))
    for name, field in data.dims.items():
        if field.field is not None:
            written = {field.name_in(config), *(alias for alias in field.aliases if alias in config)}
            out |= dict.fromkeys(written, getattr(dims, name))
        if field.narrowed is not None:
            out[field.narrowed.when] = False
    return out | {product.field: product_of(product, dims) for product in data.products}


def full_name(data: FamilyData, name: str) -> str:
    """A tensor's name as in the family file, for an old one or one without the prefix of the base model."""
    for old, new in data.old_names.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    prefix = data.optional_prefix
    known = prefix is None or name.startswith(prefix) or any(name == t.name for t in data.tensors)
    return name if known else f"{prefix}{name}"
