"""The weights of a model that are quantised, and whether a form can hold them.

That is known from config.json alone, before there is a student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.config.quantize import GROUPS, FormConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.families.linear_maps import READ_AXES, READS, is_linear_map

WEIGHT = ".weight"  # the end of the name of a linear map's weight


@dataclass(frozen=True)
class Matrix:
    """A weight that is quantised: its name on disk, its module within the layer, and what it reads."""

    name: str
    site: str
    reads: str


def layer_matrices(config: Mapping[str, Any], family: Family, layer: int) -> list[Matrix]:
    """The quantised weights of a layer, in the family's order. Raises ConfigError for a model that has other maps."""
    check_family(family)
    prefix = family.layer_prefix(layer)
    specs = family.layer_tensors(config, layer)
    return [
        Matrix(name, spec.parameter.removeprefix(prefix).removesuffix(WEIGHT), READS[spec.role][0])
        for name, spec in specs.items()
        if is_linear_map(spec)
    ]


def check_family(family: Family) -> None:
    """Raises ConfigError for a family whose layers are not of linear maps alone."""
    if "experts" in family.data.dims:
        raise ConfigError(
            "quantize", expected="a dense model", got=f"{family.name}, a mixture of experts",
            hint="leave the section quantize out",
        )  # fmt: skip
    if family.module_in_whole is not None:
        raise ConfigError(
            "quantize", expected="a model of text alone", got=f"a model of several modalities around {family.name}",
            hint="leave the section quantize out",
        )  # fmt: skip
    if family.transposed("down"):
        raise ConfigError(
            "quantize", expected="a family whose maps are stored [outputs, inputs]",
            got=f"{family.name}, whose maps are stored the other way round, for which compressed-tensors has no format",
            hint="leave the section quantize out",
        )  # fmt: skip


def check_widths(dims: Dims, forms: Iterable[FormConfig]) -> None:
    """Raises ConfigError when a group does not divide a width that a linear map reads; names what would."""
    wrong = []
    for form in forms:
        group = form.group_size or 1
        for axis in READ_AXES:
            width = dims.axis_size(axis)
            if width % group:
                near = [str(size) for size in (width // group * group, -(-width // group) * group) if size]
                wrong.append(f"{form.label}: {axis} is {width}, the nearest multiples are {' and '.join(near)}")
    if wrong:
        fits = [str(group) for group in GROUPS if not any(dims.axis_size(axis) % group for axis in READ_AXES)]
        raise ConfigError(
            "quantize.forms", expected="groups that divide every width of the student that a linear map reads",
            got="; ".join(wrong),
            hint=(f"group: {' or '.join(fits)} divides them all, or " if fits else "")
            + "prune.multiple_of lets the plan choose such widths",
        )  # fmt: skip
