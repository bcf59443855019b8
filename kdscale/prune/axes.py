"""The axes that pruning can cut, and which of them a budget can make smaller."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims
from kdscale.families.dims import SHAPE_AXES

BudgetKind = Literal["params", "bytes", "kv_bytes", "decode", "prefill"]

# The number of experts changes no latency that the latency model knows: a token is routed to as many as before.
_LATENCY_AXES = tuple(axis for axis in SHAPE_AXES if axis != "experts")

# The axes that change the cost, for budgets that do not depend on all of them: the search leaves the other axes alone.
_AXES_OF_BUDGET: dict[BudgetKind, tuple[str, ...]] = {
    "kv_bytes": ("kv_heads", "layers"),
    "decode": _LATENCY_AXES,
    "prefill": _LATENCY_AXES,
}


class Sizes(NamedTuple):
    """The sizes of one shape, in the order of SHAPE_AXES."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    experts: int  # 0 in dense models
    ssm_heads: int = 0  # these are 0 in models without ssm heads
    ssm_head_dim: int = 0
    ssm_state: int = 0

    @classmethod
    def of(cls, dims: Dims) -> Sizes:
        """The sizes of `dims` that pruning can change."""
        return cls(*(getattr(dims, axis) for axis in SHAPE_AXES))

    def dims(self, teacher: Dims) -> Dims:
        """These sizes, with what never changes from the teacher."""
        return teacher.resized(**self._asdict())


def target_kind(cfg: PruneConfig) -> BudgetKind | None:
    """What the target in `cfg` limits; None when the config gives only sizes."""
    if cfg.target is None:
        return None
    kind: Any = cfg.target[0].removeprefix("target_")
    return kind


def budget_axes(cfg: PruneConfig) -> tuple[str, ...]:
    """The axes of `cfg` whose size changes what its target limits. Raises ConfigError when there is none."""
    kind = target_kind(cfg)
    if kind is None:
        return ()
    useful = tuple(axis for axis in cfg.axes if axis in _AXES_OF_BUDGET.get(kind, cfg.axes))
    if cfg.axes and not useful:
        needed = " or ".join(_AXES_OF_BUDGET[kind])
        raise ConfigError("prune.axes", expected=f"{needed} for prune.target_{kind}", got=", ".join(cfg.axes))
    return useful


def openable_axes(cfg: PruneConfig, dims: Dims) -> tuple[str, ...]:
    """The axes that `cfg` may cut in a teacher of `dims`: set to a smaller size, or open to the search.

    The importance stage scores these axes.
    """
    given = {axis: getattr(cfg, axis) for axis in SHAPE_AXES}
    cut = {axis for axis, size in given.items() if size is not None and size < getattr(dims, axis)}
    if cfg.target is not None:
        cut |= {axis for axis in budget_axes(cfg) if axis in given and given[axis] is None}
    return tuple(axis for axis in SHAPE_AXES if axis in cut and getattr(dims, axis))
