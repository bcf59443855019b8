"""What a student may cost: parameters, bytes on disk, KV-cache bytes, or milliseconds. numpy only.

A parameter target is a size to hit, `tolerance` to either side. Every other target is a limit, because a file that is
3 % too large for the memory it must fit into is useless: shapes above it are left out, and of those below only the ones
within `tolerance` of the largest reachable cost are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kdscale.config.prune import PruneConfig
from kdscale.errors import ConfigError
from kdscale.prune.axes import BudgetKind, target_kind
from kdscale.prune.search.cost import CostModel
from kdscale.units import BUDGET_FIELDS, format_number, parse_budget

Floats = NDArray[np.float64]
Shapes = Mapping[str, NDArray[np.int64]]


class Speeds(Protocol):
    """Latencies of shapes on one machine (`latency.LatencyModel`)."""

    def milliseconds(self, kind: Literal["decode", "prefill"], shapes: Shapes) -> Floats:
        """Of each shape: of one decoded token, or of a prompt."""
        ...


@dataclass(frozen=True)
class Costs:
    """What any shape costs, in every unit that is known without its weights."""

    model: CostModel
    cfg: PruneConfig
    speeds: Speeds | None = None

    def of(self, kind: BudgetKind, shapes: Shapes) -> Floats:
        """The cost of each shape in the unit of `kind`. Raises ConfigError for a latency that was not measured."""
        if kind == "params":
            return self.model.params(shapes, self.cfg.count).astype(np.float64)
        if kind == "bytes":
            return self.model.bytes(shapes).astype(np.float64)
        if kind == "kv_bytes":
            return self.model.kv_bytes(shapes).astype(np.float64)
        if self.speeds is None:
            raise ConfigError(
                f"prune.target_{kind}", expected="latencies measured on this machine", got="none yet",
                hint="run kdscale plan without --shapes-only",
            )  # fmt: skip
        return self.speeds.milliseconds(kind, shapes)


_UNITS: dict[BudgetKind, str] = {
    "bytes": "bytes on disk",
    "kv_bytes": "bytes of 16-bit KV cache per token",
    "decode": "ms per decoded token",
    "prefill": "ms per prompt",
}


@dataclass(frozen=True)
class Budget:
    """The config's target, resolved against its teacher: `wanted` is in `unit`."""

    kind: BudgetKind
    asked: str
    wanted: float
    tolerance: float
    unit: str

    @classmethod
    def of(cls, cfg: PruneConfig, costs: Costs, teacher: Shapes) -> Budget | None:
        """None without a target. Raises ConfigError when the teacher meets it as it is."""
        kind = target_kind(cfg)
        if kind is None or cfg.target is None:
            return None
        field, asked = cfg.target
        form, value = parse_budget(asked, BUDGET_FIELDS[field])
        teacher_cost = float(costs.of(kind, teacher)[0])
        wanted = value * teacher_cost if form == "fraction" else value
        if BUDGET_FIELDS[field] != "milliseconds":
            wanted = float(max(round(wanted), 1))
        unit = _UNITS.get(kind, f"{cfg.count.replace('_', '-')} parameters")
        if wanted >= teacher_cost:
            raise ConfigError(
                f"prune.{field}",
                expected=f"fewer than the teacher's {_figure(teacher_cost)} {unit}",
                got=f"{asked} = {_figure(wanted)}",
            )
        return cls(kind, asked, wanted, cfg.tolerance, unit)

    def near(self, costs: Floats) -> NDArray[np.bool_]:
        """Which costs meet the budget."""
        if self.kind == "params":
            return np.abs(costs - self.wanted) <= self.tolerance * self.wanted
        below = costs <= self.wanted
        if not below.any():
            return below
        return below & (costs >= (1 - self.tolerance) * costs[below].max())

    def impossible(self, costs: Floats, axes: tuple[str, ...]) -> ConfigError:
        """The error for a budget that no shape meets; it names what can be reached."""
        below, above = costs[costs < self.wanted], costs[costs > self.wanted]
        nearest = [_figure(v) for v in ([below.max()] if len(below) else []) + ([above.min()] if len(above) else [])]
        what = f"within {self.tolerance:.0%} of a reachable size" if self.kind == "params" else "a reachable limit"
        return ConfigError(
            f"prune.target_{self.kind}",
            expected=f"{what}, {_figure(costs.min())} to {_figure(costs.max())} {self.unit} "
            f"with axes {', '.join(axes) or '(none)'}",
            got=f"{self.asked} = {_figure(self.wanted)} (nearest reachable: {' and '.join(nearest)})",
            hint="change the target, open another axis in prune.axes, raise prune.tolerance or lower the divisors",
        )


def _figure(value: float) -> str:
    return format_number(int(value) if value == int(value) else value)
