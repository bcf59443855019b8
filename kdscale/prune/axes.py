"""The axes that pruning can cut, and the kinds of budget."""

from __future__ import annotations

from typing import Any, Literal

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims
from kdscale.families.family import SHAPE_AXES

Kind = Literal["params", "bytes", "kv_bytes", "decode", "prefill"]


# A budget that an axis has no influence on must not cut it. How many experts there are changes no latency that the
# model of it knows: a token goes to as many as before.
_TIMED = ("hidden", "ffn", "heads", "kv_heads", "layers")


_ONLY: dict[Kind, tuple[str, ...]] = {"kv_bytes": ("kv_heads", "layers"), "decode": _TIMED, "prefill": _TIMED}


def kind_of(cfg: PruneConfig) -> Kind | None:
    """What the config's target limits; None when only sizes are given."""
    if cfg.target is None:
        return None
    kind: Any = cfg.target[0].removeprefix("target_")
    return kind


def budget_axes(cfg: PruneConfig) -> tuple[str, ...]:
    """The axes of the config that its target can make smaller. Raises ConfigError when there is none."""
    kind = kind_of(cfg)
    if kind is None:
        return ()
    useful = tuple(axis for axis in cfg.axes if axis in _ONLY.get(kind, cfg.axes))
    if cfg.axes and not useful:
        raise ConfigError(
            "prune.axes", expected=f"{' or '.join(_ONLY[kind])} for prune.target_{kind}", got=", ".join(cfg.axes)
        )
    return useful


def openable_axes(cfg: PruneConfig, dims: Dims) -> tuple[str, ...]:
    """Axes that this config may cut: given a size below the teacher's, or open to the search. What importance needs."""
    given = {axis: getattr(cfg, axis) for axis in SHAPE_AXES}
    cut = {axis for axis, size in given.items() if size is not None and size < getattr(dims, axis)}
    if cfg.target is not None:
        cut |= {axis for axis in budget_axes(cfg) if axis in given and given[axis] is None}
    return tuple(axis for axis in SHAPE_AXES if axis in cut and getattr(dims, axis))
