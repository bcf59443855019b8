"""Which shapes a student may have: the sizes that the config gives, and all shapes over the axes left open."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.families import Dims, Family
from kdscale.families.dims import SHAPE_AXES
from kdscale.prune.axes import Sizes, budget_axes

# From these teacher sizes on a step is 256, which suits tensor cores and tensor parallelism; below, 32.
_REAL_HIDDEN, _REAL_FFN = 2048, 4096
_REAL_STEP, _SMALL_STEP = 256, 32
# The same for experts, which expert parallelism divides.
_MANY_EXPERTS, _EXPERTS_STEP = 64, 8
_CHANNELS_STEP, _STATE_STEP = 8, 16  # of ssm heads, and of their state
_OF_MIXERS = ("ssm_heads", "ssm_head_dim", "ssm_state")
_HEADS = "heads*head_dim"
_READ_BY_MAPS = ("hidden", _HEADS, "ffn")  # axes whose width is how much a linear map reads


def columns(shapes: Any) -> dict[str, NDArray[np.int64]]:
    """Shapes (rows in the order of SHAPE_AXES) as one array per axis."""
    rows = np.asarray(shapes, dtype=np.int64)
    return {axis: rows[:, index] for index, axis in enumerate(SHAPE_AXES)}


class ShapeSpace:
    """The shapes that students of one teacher may have under one config."""

    def __init__(self, teacher: Dims, family: Family, cfg: PruneConfig):
        self._teacher, self._family, self._cfg = teacher, family, cfg

    def given(self) -> Sizes:
        """The teacher's sizes with those that the config gives. Raises ConfigError for a size that is not allowed."""
        teacher, cfg = self._teacher, self._cfg
        budget_axes(cfg)  # refuses axes that have no influence on the target
        if "experts" in cfg.axes and not teacher.experts:
            raise ConfigError("prune.axes", expected="axes of a dense teacher", got=", ".join(cfg.axes))
        if set(_OF_MIXERS) & set(cfg.axes) and not teacher.ssm_heads:
            got = ", ".join(cfg.axes)
            raise ConfigError("prune.axes", expected="axes of a teacher whose layers have no ssm heads", got=got)
        for axis in SHAPE_AXES:
            self._check_size(axis)
        heads, kv_heads = self._given_heads()
        sizes = Sizes(
            cfg.hidden or teacher.hidden,
            cfg.ffn or teacher.ffn,
            heads,
            kv_heads,
            cfg.layers or teacher.layers,
            cfg.experts or teacher.experts,
            *(getattr(cfg, axis) or getattr(teacher, axis) for axis in _OF_MIXERS),
        )
        if wrong := self.violations(sizes):
            fields = [f"prune.{axis}" for axis in SHAPE_AXES if getattr(cfg, axis) is not None]
            raise ConfigError(
                ", ".join(fields) or "prune", expected="sizes that the family allows", got="; ".join(wrong)
            )
        self._check_multiples(sizes)
        return sizes

    def violations(self, sizes: Sizes) -> list[str]:
        """Why the family refuses this shape; empty when it does not."""
        return self._family.violations(sizes.dims(self._teacher))

    def all(self) -> NDArray[np.int64]:
        """Every allowed shape over the open axes, one row per shape in the order of SHAPE_AXES.

        Raises ConfigError when there is none.
        """
        cfg, teacher = self._cfg, self._teacher
        hidden_step = self._step(
            "hidden", cfg.hidden_divisor or (_REAL_STEP if teacher.hidden >= _REAL_HIDDEN else _SMALL_STEP)
        )
        ffn_step = self._step("ffn", cfg.ffn_divisor or (_REAL_STEP if teacher.ffn >= _REAL_FFN else _SMALL_STEP))
        experts_step = cfg.experts_divisor or (_EXPERTS_STEP if teacher.experts >= _MANY_EXPERTS else 1)
        experts = [n for n in self._options("experts", experts_step) if not self._violations(experts=n)]
        rows = [
            (hidden, ffn, heads, kv_heads, layers, kept_experts, *mixer)
            for hidden, (heads, kv_heads), *mixer in itertools.product(
                self._options("hidden", hidden_step),
                self._head_options(),
                self._options("ssm_heads", teacher.ssm_groups),
                self._options("ssm_head_dim", cfg.ssm_head_dim_divisor or _CHANNELS_STEP),
                self._options("ssm_state", cfg.ssm_state_divisor or _STATE_STEP),
            )
            if not self._family.violations(
                teacher.replace(
                    hidden=hidden, heads=heads, kv_heads=kv_heads, **dict(zip(_OF_MIXERS, mixer, strict=True))
                )
            )
            for ffn, layers, kept_experts in itertools.product(
                self._options("ffn", ffn_step), self._options("layers", 1), experts
            )
        ]
        if not rows:
            raise ConfigError("prune.axes", expected="at least one shape that the family allows", got=str(cfg.axes))
        return np.array(rows, dtype=np.int64)

    def _violations(self, **sizes: int) -> list[str]:
        return self._family.violations(self._teacher.replace(**sizes))

    def _is_open(self, axis: str) -> bool:
        return axis in budget_axes(self._cfg) and getattr(self._cfg, axis) is None

    def _options(self, axis: str, step: int) -> list[int]:
        """The sizes of one axis: the given one, the teacher's, or multiples of `step` up to the teacher's."""
        limit: int = getattr(self._teacher, axis)
        if not self._is_open(axis):
            return [getattr(self._cfg, axis) or limit]
        whole = limit % self._multiple(axis) == 0
        return sorted({*range(step, limit, step), *([limit] if whole else [])})

    def _head_options(self) -> list[tuple[int, int]]:
        """(query heads, kv heads): as many query heads for every kv head."""
        group, heads = self._teacher.heads // self._teacher.kv_heads, self._cfg.heads
        pairs = []
        for kv_heads in self._options("kv_heads", 1):
            if heads is not None:
                pairs += [(heads, kv_heads)] if heads % kv_heads == 0 and heads // kv_heads <= group else []
            else:
                pairs += [
                    (kv_heads * n, kv_heads) for n in (range(1, group + 1) if self._is_open("heads") else [group])
                ]
        return [
            pair
            for pair in pairs
            if not self._teacher.replace(heads=pair[0]).axis_size(_HEADS) % self._multiple(_HEADS)
        ]

    def unfit(self, sizes: Sizes) -> dict[str, int]:
        """The axes whose width is no multiple of `prune.multiple_of`, with that width."""
        dims = sizes.dims(self._teacher)
        widths = {axis: dims.axis_size(axis) for axis in _READ_BY_MAPS}
        return {axis: width for axis, width in widths.items() if width % self._multiple(axis)}

    def _multiple(self, axis: str) -> int:
        return (self._cfg.multiple_of or 1) if axis in _READ_BY_MAPS else 1

    def _step(self, axis: str, step: int) -> int:
        return math.lcm(step, self._multiple(axis))

    def _check_multiples(self, sizes: Sizes) -> None:
        """Raises ConfigError for a width that is fixed, and no multiple of what it is to be."""
        multiple = self._multiple("ffn")
        cut_with = {_HEADS: ("heads", "kv_heads")}  # the axes that change a width, where it is no axis itself
        wrong = {
            axis: width
            for axis, width in self.unfit(sizes).items()
            if not any(map(self._is_open, cut_with.get(axis, (axis,))))
        }
        if wrong:
            said = "; ".join(f"{axis} is {width} ({_nearest(width, multiple)})" for axis, width in wrong.items())
            raise ConfigError(
                "prune.multiple_of", expected=f"widths that are multiples of {multiple}", got=said,
                hint="give such sizes, let prune.axes cut these, or choose smaller groups in quantize.forms",
            )  # fmt: skip

    def _check_size(self, axis: str) -> None:
        size, limit = getattr(self._cfg, axis), getattr(self._teacher, axis)
        if size is not None and size > limit:
            lacks = "is no mixture of experts" if axis == "experts" else "has no layers with ssm heads"
            most = f"at most the teacher's {limit}" if limit else f"none: the teacher {lacks}"
            raise ConfigError(f"prune.{axis}", expected=most, got=str(size))
        step = getattr(self._cfg, f"{axis}_divisor", None)
        if size is not None and step is not None and size % step:
            raise ConfigError(f"prune.{axis}", expected=f"a multiple of prune.{axis}_divisor ({step})", got=str(size))

    def _given_heads(self) -> tuple[int, int]:
        """The given or the teacher's (query heads, kv heads). Raises ConfigError when no kv heads go with the given."""
        cfg, group = self._cfg, self._teacher.heads // self._teacher.kv_heads
        kv_heads = cfg.kv_heads or self._teacher.kv_heads
        heads = cfg.heads or kv_heads * group
        if cfg.kv_heads is None and "kv_heads" not in cfg.axes and heads % kv_heads:
            raise _bad_heads(heads, f"a multiple of the teacher's {kv_heads} kv heads")
        if cfg.kv_heads is not None and (heads % kv_heads or heads // kv_heads > group):
            raise _bad_heads(heads, f"1 to {group} query heads for each of {kv_heads} kv heads")
        if heads % kv_heads:  # kv_heads is open: the search finds a count that divides
            kv_heads = max(k for k in range(1, kv_heads + 1) if heads % k == 0 and heads // k <= group)
        return heads, kv_heads


def _nearest(width: int, multiple: int) -> str:
    near = sorted({size for size in (width // multiple * multiple, -(-width // multiple) * multiple) if size})
    return f"nearest: {' and '.join(map(str, near))}"


def _bad_heads(heads: int, expected: str) -> ConfigError:
    hint = "every kv group keeps the same number of query heads"
    return ConfigError("prune.heads", expected=expected, got=str(heads), hint=hint)
