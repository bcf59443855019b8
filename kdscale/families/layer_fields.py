"""Fields of a config that follow from others, have an entry a layer, or count layers: what they say, and what a
student's say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.dims import Dims
from kdscale.families.limits import LARGEST
from kdscale.families.schema import Constraint, FamilyData, LayerList, Narrowed, ProductField, evaluate

Config = Mapping[str, Any]


def narrowed(rule: Narrowed, value: Any, config: Config, where: str) -> Any:
    """The width that a config means with `value` in the field. Raises CheckpointError for a factor that is none."""
    if not config.get(rule.when, rule.absent) or type(value) is not int or value > LARGEST["ffn"]:
        return value  # too large is said of the value itself
    factor, step = config.get(rule.factor, rule.factor_absent), config.get(rule.multiple_of, rule.multiple_absent)
    if factor is None:
        return int(2 * value / 3)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or type(step) is not int or step < 1:
        expected, got = "a number, and a positive integer", f"{factor!r} and {step!r}"[:100]
        raise CheckpointError(f"{where}: {rule.factor} and {rule.multiple_of}", expected=expected, got=got)
    return -(-int(factor * int(2 * value / 3)) // step) * step


def product_of(product: ProductField, dims: Dims) -> int:
    """What a model of these sizes has in such a field."""
    return dims.axis_size(product.equals) // (1 if product.over is None else int(getattr(dims, product.over)))


def products_that_differ(data: FamilyData, config: Config, dims: Dims) -> list[str]:
    """One sentence for each field that does not say what the dimensions multiply to."""
    said = {product.field: (product, config.get(product.field, product.absent)) for product in data.products}
    return [
        f"{field} ({value!r}) is not {product_of(product, dims)}, which {product.equals}"
        f"{f' // {product.over}' if product.over else ''} is: {product.why}"
        for field, (product, value) in said.items()
        if value is not None and value != product_of(product, dims)
    ]


def broken_constraints(rules: Sequence[Constraint], dims: Dims, fixed: Mapping[str, int]) -> list[str]:
    """One sentence for each of these rules that sizes break; `fixed` are those that never change."""
    sizes, out = dims.sizes() | dict(fixed), list[str]()
    for rule in rules:
        if rule.by is not None and sizes[rule.dim] % (sizes[rule.by] or 1):
            out.append(f"{rule.dim} ({sizes[rule.dim]}) is not a multiple of {rule.by} ({sizes[rule.by]}): {rule.why}")
        if rule.equals is not None and sizes[rule.dim] != dims.axis_size(rule.equals):
            product = f"{rule.equals} ({dims.axis_size(rule.equals)})"
            out.append(f"{rule.dim} ({sizes[rule.dim]}) is not {product}: {rule.why}")
    return out


def underived_sizes(data: FamilyData, dims: Dims, fixed: Mapping[str, int]) -> list[str]:
    """One sentence for each size without a config field that is not what the others make it."""
    sizes = dims.sizes() | dict(fixed)
    derived = {name: field.always for name, field in data.dims.items() if field.always is not None}
    return [
        f"{name} ({sizes[name]}) is not {rule} ({evaluate(rule, sizes)}): the family's config has no field for it"
        for name, rule in derived.items()
        if sizes[name] != evaluate(rule, sizes) and not (data.dims[name].when is not None and sizes[name] == 0)
    ]


def changed_axes(data: FamilyData, dims: Dims, teacher: Dims) -> list[str]:
    """One sentence for each axis that has another size than the teacher's, and that the family does not cut."""
    return [
        f"{axis} ({getattr(dims, axis)}) is not the teacher's {getattr(teacher, axis)}: {why}"
        for axis, why in data.uncut.items()
        if getattr(dims, axis) != getattr(teacher, axis)
    ]


def undivided_products(data: FamilyData, dims: Dims) -> list[str]:
    """One sentence for each field of products for which the dimension `over` does not divide the product."""
    fields = [(product, product.over) for product in data.products if product.over is not None]
    return [
        f"{product.equals} ({dims.axis_size(product.equals)}) is not a multiple of {over} ({getattr(dims, over)}): "
        f"{product.why}"
        for product, over in fields
        if dims.axis_size(product.equals) % getattr(dims, over)
    ]


def layer_list(entry: LayerList, config: Config, layers: int, where: str) -> list[Any] | None:
    """One value a layer, as transformers takes them when the field is absent; None if there is nothing to cut."""
    values, rule = listed(entry, config, where), entry.absent
    if values is None and rule is not None:
        every = config.get(rule.every_field, rule.every) if rule.every_field else rule.every
        if not isinstance(every, int) or every < 1:
            raise CheckpointError(f"{where}: {rule.every_field}", expected="a positive integer", got=repr(every))
        values = rule.entries(layers, every)
    if values is not None and (not isinstance(values, list) or len(values) < layers):
        raise CheckpointError(f"{where}: {entry.field}", expected=f"a list of {layers} entries", got=repr(values))
    return values if values is None or entry.last is None else [*values[: layers - 1], entry.last]


def overrides(data: FamilyData, config: Config, where: str) -> dict[str, Any]:
    """What some layers have otherwise, the same in all of them; empty where the config says nothing of single layers.

    Raises CheckpointError where they differ among each other.
    """
    of_layers = None if data.layer_overrides is None else config.get(data.layer_overrides)
    if of_layers is None:
        return {}
    entries: list[Any] = list(of_layers.values()) if isinstance(of_layers, dict) else [None]
    if not all(isinstance(entry, dict) and entry == entries[0] for entry in entries):
        expected = "layer numbers, each with the same fields and values"
        raise CheckpointError(f"{where}: {data.layer_overrides}", expected=expected, got=repr(of_layers)[:200])
    return dict(entries[0]) if entries else {}


def listed(entry: LayerList, config: Config, where: str) -> Any:
    """What the config has in the list's field, or says in letters; None where it says nothing."""
    values, letters = config.get(entry.field), entry.letters
    if values == [] and entry.empty_is_absent:
        return None
    if values is not None or letters is None or (text := config.get(letters.field)) is None:
        return values
    if not isinstance(text, str) or set(text) - set(letters.of):
        expected = f"a text of the letters {' '.join(letters.of)}"
        raise CheckpointError(f"{where}: {letters.field}", expected=expected, got=repr(text)[:100])
    return [letters.of[letter] for letter in text]


def counted(data: FamilyData, list_field: str, name: str, value: Any, config: Config, where: str) -> Any:
    """The length of a layer list, which transformers goes by; `value`, of the field `name`, where there is no list."""
    values = listed(next(entry for entry in data.layer_lists if entry.field == list_field), config, where)
    if not isinstance(values, list) or value in (None, len(values)):
        return len(values) if isinstance(values, list) else value
    if type(value) is not int or value > LARGEST["layers"]:
        return value  # which the size alone says
    got = f"{value!r}, and {len(values)} layers in {list_field}"
    raise CheckpointError(f"{where}: {name}", expected="as many layers as are listed", got=got)


def cut_layer_fields(
    data: FamilyData, config: Config, student: dict[str, Any], kept: Sequence[int], layers: int, where: str
) -> None:
    """Write the entries of the kept layers into the student's config; `layers` are the teacher's."""
    for entry in data.layer_lists:
        values = layer_list(entry, config, layers, where)
        if values is not None:
            if entry.last not in (None, values[kept[-1]]):
                raise ConfigError(
                    f"no {data.name} model ends with layer {kept[-1]}", expected=f"a last layer of {entry.last}",
                    got=str(values[kept[-1]]), hint=f"keep the last layer ({layers - 1})",
                )  # fmt: skip
            student[entry.field] = [values[i] for i in kept]
            if entry.letters is not None:
                student.pop(entry.letters.field, None)
            _drop_stale_interval(entry, student, where)
    if data.layer_overrides is not None and isinstance(said := config.get(data.layer_overrides), dict):
        places = {str(layer): str(place) for place, layer in enumerate(kept)}
        student[data.layer_overrides] = {places[i]: value for i, value in said.items() if i in places}
    for boundary in data.layer_boundaries:
        border = config.get(boundary.field, boundary.absent)
        if type(border) is not int:
            raise CheckpointError(f"{where}: {boundary.field}", expected="a number of layers", got=repr(border))
        student[boundary.field] = sum(layer < border for layer in kept)


def _drop_stale_interval(entry: LayerList, student: dict[str, Any], where: str) -> None:
    """Remove the fields that still say the list as one interval, where no interval gives the cut list.

    A pattern in letters (EXAONE's `LLLG`) is no interval, and goes.
    """
    every_field = entry.absent.every_field if entry.absent else None
    for name in (every_field, *entry.said_too):
        if name in student:
            plain = {**student, entry.field: None} | ({every_field: student[name]} if every_field else {})
            letters = isinstance(student[name], str)
            if letters or layer_list(entry, plain, len(student[entry.field]), where) != student[entry.field]:
                del student[name]
