"""Fields of a config that follow from others, have an entry a layer, or count layers: what they say, and what a
student's say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.dims import Dims
from kdscale.families.limits import LARGEST
from kdscale.families.schema import FamilyData, LayerList, Narrowed, ProductField

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
        return rule.entries(layers, every)
    if values is not None and (not isinstance(values, list) or len(values) < layers):
        raise CheckpointError(f"{where}: {entry.field}", expected=f"a list of {layers} entries", got=repr(values))
    return values


def listed(entry: LayerList, config: Config, where: str) -> Any:
    """What the config has in the list's field, or says in letters; None where it says nothing."""
    values, letters = config.get(entry.field), entry.letters
    if values is not None or letters is None or (text := config.get(letters.field)) is None:
        return values
    if not isinstance(text, str) or set(text) - set(letters.of):
        expected = f"a text of the letters {' '.join(letters.of)}"
        raise CheckpointError(f"{where}: {letters.field}", expected=expected, got=repr(text)[:100])
    return [letters.of[letter] for letter in text]


def cut_layer_fields(
    data: FamilyData, config: Config, student: dict[str, Any], kept: Sequence[int], layers: int, where: str
) -> None:
    """Write the entries of the kept layers into the student's config; `layers` are the teacher's."""
    for entry in data.layer_lists:
        values = layer_list(entry, config, layers, where)
        if values is not None:
            student[entry.field] = [values[i] for i in kept]
            if entry.letters is not None:
                student.pop(entry.letters.field, None)
            _drop_stale_interval(entry, student, where)
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
