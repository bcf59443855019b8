"""Which basis the hidden axis is cut in: the coordinates as they are, or principal components (prune/rotation.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Family
from kdscale.prune.axes import openable_axes
from kdscale.prune.plan import Plan
from kdscale.prune.rotation import rotation_obstacle, untied_config


@dataclass(frozen=True)
class HiddenBasis:
    """What a plan in one basis is made from: the model's config (a rotated teacher has a head of its own, which
    counts), and the pruning settings with `hidden_method` decided."""

    config: dict[str, Any]
    cfg: PruneConfig
    rotated: bool = False
    warnings: tuple[str, ...] = ()  # for the plan

    def suits(self, plan: Plan) -> bool:
        """Whether the plan can be used. A rotation is of no use where the search leaves the hidden axis uncut."""
        return not self.rotated or plan.student.hidden < plan.teacher.hidden


def hidden_bases(config: Mapping[str, Any], family: Family, cfg: PruneConfig) -> list[HiddenBasis]:
    """The bases to plan in, in order; the first whose plan suits it is the one. The last suits any plan.

    `config` is the teacher's. Raises ConfigError when `cfg` asks for `pca` in a model that cannot be rotated.
    """
    plain, dims = dict(config), family.dims(dict(config))
    cuts = "hidden" in openable_axes(cfg, dims)
    obstacle = rotation_obstacle(family, plain) if cuts and cfg.hidden_method != "activation" else None
    if obstacle and cfg.hidden_method == "pca":
        hint = "set prune.hidden_method=activation"
        raise ConfigError("prune.hidden_method: pca", expected="a model that can be rotated", got=obstacle, hint=hint)
    if not cuts or obstacle or cfg.hidden_method == "activation":
        return [HiddenBasis(plain, cfg.model_copy(update={"hidden_method": "activation"}))]
    ends_tie = (
        "the head gets a weight of its own: rotating the hidden axis ends its tie to the embedding "
        "(prune.hidden_method=activation keeps it)"
    )
    rotated = HiddenBasis(
        untied_config(plain, family), cfg.model_copy(update={"hidden_method": "pca"}), rotated=True,
        warnings=(ends_tie,) if family.tied(plain) else (),
    )  # fmt: skip
    without_hidden = tuple(axis for axis in cfg.axes if axis != "hidden")
    return [rotated, HiddenBasis(plain, cfg.model_copy(update={"axes": without_hidden}))]
