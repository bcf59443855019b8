"""Which basis the hidden axis is cut in: the coordinates as they are, or principal components (prune/rotation.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.prune.axes import openable_axes
from kdscale.prune.plan import Plan
from kdscale.prune.rotation import rotation_obstacle, untied_config
from kdscale.prune.stream_cut import refit_obstacle
from kdscale.units import format_count


@dataclass(frozen=True)
class HiddenBasis:
    """What a plan in one basis is made from: the model's config (a rotated teacher has a head of its own, which
    counts), and the pruning settings with `hidden_method` decided."""

    config: dict[str, Any]
    cfg: PruneConfig
    rotated: bool = False
    unties: bool = False

    def suits(self, plan: Plan) -> bool:
        """Whether the plan can be used. A rotation is of no use where the search leaves the hidden axis uncut."""
        return not self.rotated or plan.student.hidden < plan.teacher.hidden

    def warnings(self, plan: Plan) -> list[str]:
        """What the plan is to say of the basis."""
        if not self.unties:
            return []
        added = plan.student.vocab * plan.student.hidden
        return [
            "the head gets a weight of its own: rotating the hidden axis ends its tie to the embedding, which adds "
            f"{format_count(added, 3)} parameters (prune.hidden_method refit and activation keep the tie)"
        ]


def hidden_bases(config: Mapping[str, Any], family: Family, cfg: PruneConfig) -> list[HiddenBasis]:
    """The bases to plan in, in order; the first whose plan suits it is the one. The last suits any plan.

    `config` is the teacher's. Raises ConfigError when `cfg` asks for `pca` or `refit` where that cannot be done.
    """
    plain, dims = dict(config), family.dims(dict(config))
    cuts = "hidden" in openable_axes(cfg, dims)
    if cuts and cfg.hidden_method in ("auto", "refit"):
        reason = _settings_without_refit(cfg, dims) or refit_obstacle(family, plain)
        if reason is None:
            return [HiddenBasis(plain, cfg.model_copy(update={"hidden_method": "refit"}))]
        if cfg.hidden_method == "refit":
            hint = "set prune.hidden_method=auto"
            raise ConfigError(
                "prune.hidden_method: refit", expected="a stream that can be refitted", got=reason, hint=hint
            )
    obstacle = rotation_obstacle(family, plain) if cuts and cfg.hidden_method != "activation" else None
    if obstacle and cfg.hidden_method == "pca":
        hint = "set prune.hidden_method=activation"
        raise ConfigError("prune.hidden_method: pca", expected="a model that can be rotated", got=obstacle, hint=hint)
    if not cuts or obstacle or cfg.hidden_method == "activation":
        return [HiddenBasis(plain, cfg.model_copy(update={"hidden_method": "activation"}))]
    rotated = HiddenBasis(
        untied_config(plain, family), cfg.model_copy(update={"hidden_method": "pca"}), rotated=True,
        unties=bool(family.tied(plain)),
    )  # fmt: skip
    without_hidden = tuple(axis for axis in cfg.axes if axis != "hidden")
    return [rotated, HiddenBasis(plain, cfg.model_copy(update={"axes": without_hidden}))]


def _settings_without_refit(cfg: PruneConfig, dims: Dims) -> str | None:
    """What in the settings keeps the stream from being refitted, or None."""
    if cfg.compensate != "two_stream":
        return f"prune.compensate={cfg.compensate}: without regressions in both streams nothing is refitted"
    if cfg.layer_repair != "none" and "layers" in openable_axes(cfg, dims):
        return f"prune.layer_repair={cfg.layer_repair}: gaps between layers are repaired in the teacher's own stream"
    return None
