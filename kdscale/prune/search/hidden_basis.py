"""Which basis the hidden axis is cut in: the given coordinates or principal components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family
from kdscale.prune.axes import openable_axes
from kdscale.prune.plan import Plan
from kdscale.prune.rotation import rotation_obstacle, untied_config
from kdscale.weights import Checkpoint

MakePlan = Callable[[Mapping[str, Any], Family, Mapping[str, Any] | None, PruneConfig], Plan]


def choose(
    teacher: Checkpoint, family: Family, scores: Mapping[str, Any] | None, cfg: PruneConfig, make_plan: MakePlan
) -> Plan:
    """`make_plan` for the teacher as it is or, when the hidden axis is cut by principal components, as it is turned.

    The turned teacher has a head of its own, which counts. When the axis is open but the search leaves it whole, the
    plan is made again without it, for the teacher as it is. Raises ConfigError when `pca` is asked of a family that
    cannot be turned.
    """
    hidden = family.dims(teacher.config).hidden
    cuts = "hidden" in openable_axes(cfg, family.dims(teacher.config))
    reason = rotation_obstacle(family, teacher.config) if cuts and cfg.hidden_method != "activation" else None
    if reason and cfg.hidden_method == "pca":
        hint = "set prune.hidden_method=activation"
        raise ConfigError("prune.hidden_method: pca", expected="a model that can be rotated", got=reason, hint=hint)
    if not cuts or reason or cfg.hidden_method == "activation":
        return make_plan(teacher.config, family, scores, cfg.model_copy(update={"hidden_method": "activation"}))
    plan = make_plan(
        untied_config(teacher.config, family), family, scores, cfg.model_copy(update={"hidden_method": "pca"})
    )
    if plan.student.hidden == hidden:
        axes = tuple(axis for axis in cfg.axes if axis != "hidden")
        return make_plan(teacher.config, family, scores, cfg.model_copy(update={"axes": axes}))
    if family.tied(teacher.config):
        plan.warnings.append(
            "the head gets a weight of its own: rotating the hidden axis ends its tie to the embedding "
            "(prune.hidden_method=activation keeps it)"
        )
    return plan
