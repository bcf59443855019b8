"""Layers of several kinds in one model: which layer is of which kind, and the config that says so of a student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families.layer_fields import layer_list
from kdscale.families.schema import LAYER, FamilyData, LayerCondition, LayerKinds

Config = Mapping[str, Any]
Kinds = frozenset[str]  # of one layer: one name for each entry of the family's `layer_kinds`


def layer_kinds(data: FamilyData, config: Config, layers: int, where: str) -> list[Kinds]:
    """The kinds of each layer. Raises CheckpointError for a field that says no kind of a layer."""
    answers = [_answers(rule, data, config, layers, where) for rule in data.layer_kinds]
    kinds = [frozenset(of_layer) for of_layer in zip(*answers, strict=True)] if answers else [frozenset()] * layers
    if lacking := lacking_sources(data, kinds):
        raise CheckpointError(
            f"{where}: layers read keys and values of earlier ones", got="none",
            expected=f"a layer of the kinds {', '.join(sorted(lacking[0]))}",
        )  # fmt: skip
    return kinds


def write_layer_kinds(data: FamilyData, student: dict[str, Any], wanted: Sequence[Kinds], where: str) -> None:
    """Make `student`, a config whose lists are cut already, say that its layers are of the kinds `wanted`.

    Raises ConfigError where no config of the family gives layers of these kinds in this order.
    """
    for rule in data.layer_kinds:
        if rule.field is not None:
            continue  # one of the lists
        marked = [str(rule.kind) in kinds for kinds in wanted]
        if _holding(rule, student, len(wanted), where) != marked:
            _rewrite(rule, student, marked)
        if _holding(rule, student, len(wanted), where) != marked:
            order = ", ".join(str(rule.kind if mark else rule.otherwise) for mark in marked)
            fields = ", ".join(condition.field for condition in rule.where) or "a config"
            raise ConfigError(
                f"no {data.name} model has the kept layers in their order", expected=f"layers that {fields} can give",
                got=order, hint="keep other layers, or leave the axis layers alone",
            )  # fmt: skip
    if lacking := lacking_sources(data, wanted):
        raise ConfigError(
            f"no {data.name} model has the kept layers", got="none with keys and values of its own",
            expected=f"a layer of the kinds {', '.join(sorted(lacking[0]))}, whose keys and values others read",
        )  # fmt: skip


def lacking_sources(data: FamilyData, kinds: Sequence[Kinds]) -> list[Kinds]:
    """Of which kinds a model of such layers needs one more, with keys and values of its own, that others can read.

    Where any layer reads those of an earlier one, there must be an earlier one of all kinds that there are.
    """
    sharing = data.shared_keys_in
    if sharing is None or not any(sharing in each for each in kinds):
        return []
    (rule,) = (rule for rule in data.layer_kinds if sharing in rule.names)
    own = frozenset(rule.names) - {sharing}
    return list(dict.fromkeys(each - {sharing} | own for each in kinds if each - {sharing} | own not in kinds))


def unread_names(data: FamilyData, kinds: Callable[[], Sequence[Kinds]]) -> tuple[str, ...]:
    """Names of keys and values of layers that read those of others, which published files may have all the same.

    `kinds`: those of each layer, asked for where any layer can do that.
    """
    if (kind := data.shared_keys_in) is None:
        return ()
    templates = dict.fromkeys(t.name for t in data.tensors if kind in t.not_in)  # some have other axes in other kinds
    sharing = [layer for layer, each in enumerate(kinds()) if kind in each]
    return tuple(name.replace(LAYER, str(layer)) for layer in sharing for name in templates)


def _answers(rule: LayerKinds, data: FamilyData, config: Config, layers: int, where: str) -> list[str]:
    if rule.field is None:
        return [str(rule.kind if holds else rule.otherwise) for holds in _holding(rule, config, layers, where)]
    entry = next(entry for entry in data.layer_lists if entry.field == rule.field)
    values = layer_list(entry, config, layers, where)
    wrong = [value for value in (values or ())[:layers] if not isinstance(value, str) or value not in rule.kinds]
    if values is None or wrong:
        got = "no such field" if values is None else repr(wrong[0])[:100]
        raise CheckpointError(f"{where}: {rule.field}", expected=f"entries of {', '.join(rule.kinds)}", got=got)
    return [rule.kinds[value] for value in values[:layers]]


def _holding(rule: LayerKinds, config: Config, layers: int, where: str) -> list[bool]:
    """Of each layer, whether all conditions hold."""
    if rule.first:
        return [layer == 0 for layer in range(layers)]
    columns = [_holds(condition, config, layers, where) for condition in rule.where]
    return [all(of_layer) for of_layer in zip(*columns, strict=True)]


def _holds(condition: LayerCondition, config: Config, layers: int, where: str) -> list[bool]:
    if condition.unless is not None and config.get(condition.unless) is not None:
        return [True] * layers
    value = config.get(condition.field)
    if condition.rule in ("in", "not_in"):
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise CheckpointError(f"{where}: {condition.field}", expected="a list of layer numbers", got=repr(value))
        listed = set(range(layers) if value is None and condition.rule == "in" else value or ())
        return [(layer in listed) == (condition.rule == "in") for layer in range(layers)]
    number = condition.absent if value is None else value
    if type(number) is not int or number < {"every": 1, "last": 0}.get(condition.rule, number):
        expected = "a positive number" if condition.rule == "every" else "a number of layers"
        raise CheckpointError(f"{where}: {condition.field}", expected=expected, got=repr(number)[:100])
    if condition.rule == "every":
        return [(layer + 1) % number == 0 for layer in range(layers)]
    if condition.rule == "from":
        return [layer >= number for layer in range(layers)]
    if condition.rule == "last":
        return [layer >= layers - number for layer in range(layers)]
    return [number == -1 or layer <= number for layer in range(layers)]


def _rewrite(rule: LayerKinds, student: dict[str, Any], marked: Sequence[bool]) -> None:
    """Fields that give the marked layers, and no other, wherever the conditions can say that."""
    numbers = [layer for layer, mark in enumerate(marked) if mark]
    first, last = (numbers[0], numbers[-1]) if numbers else (len(marked), len(marked) - 1)
    values: dict[str, Any] = {
        "in": numbers, "not_in": [layer for layer, mark in enumerate(marked) if not mark],
        "from": first, "to": last, "last": len(marked) - first, "every": 1,
    }  # fmt: skip
    for condition in rule.where:
        if condition.unless is None:
            student[condition.field] = values[condition.rule]
        else:
            student.pop(condition.field, None)  # it said the same as the other field, which says something else now
