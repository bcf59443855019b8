"""Experts in groups, of which a token may choose some (DeepSeek-V2 and V3): how many, and what a student may keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdscale.errors import CheckpointError
from kdscale.families.schema.config_fields import ExpertGroups


def expert_groups(rule: ExpertGroups | None, config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """(groups, how many of them a token may choose); (1, 1) without groups. Raises CheckpointError for other values."""
    if rule is None:
        return 1, 1
    found = {field: 1 if config.get(field) is None else config[field] for field in (rule.field, rule.used)}
    for field, value in found.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {field}", expected="a positive integer", got=repr(value)[:100])
    return found[rule.field], found[rule.used]


def group_violations(
    rule: ExpertGroups | None, groups_and_used: tuple[int, int], experts: int, per_token: int
) -> list[str]:
    """A sentence where so many experts cannot be in these groups; empty where they can."""
    groups, used = groups_and_used
    if rule is None or groups == 1:
        return []
    of_group = experts // groups
    if experts % groups:
        return [f"experts ({experts}) is not a multiple of the {groups} groups that they are in"]
    if of_group < rule.least or used * of_group < per_token:
        return [
            f"experts ({experts}) leave {of_group} in each of {groups} groups: a token is routed to {per_token} in "
            f"{used} of them, and a group needs {rule.least}"
        ]
    return []
