"""The rows of the list of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kdscale.runs.metrics_log import is_figure
from kdscale.service.database.runs import Run
from kdscale.service.page.charts import sparkline
from kdscale.service.states import FINAL
from kdscale.units import format_number


@dataclass(frozen=True)
class Row:
    """A run in the list. `share`: how much of it is done, 0 to 1, None where that is not known."""

    run: Run
    doing: str
    share: float | None
    speed: str
    spark: Markup


def row(run: Run) -> Row:
    """What the list shows of a run."""
    ended = run.state in FINAL
    return Row(
        run,
        "" if ended else stage(run),
        None if ended else share(run),
        "" if ended else format_speed(number(run.progress, "tokens_per_second")),
        sparkline(losses(run.progress)),
    )


def stage(run: Run) -> str:
    """The stage that a run is in."""
    return str(run.progress.get("stage") or "")


def share(run: Run) -> float | None:
    """How much of the run is done, 0 to 1."""
    found = number(run.progress, "share")
    return None if found is None else min(1.0, max(0.0, found))


def format_speed(value: float | None) -> str:
    """Tokens a second."""
    return "" if value is None else format_number(float(f"{value:.3g}") if value < 100 else round(value))


def number(progress: dict[str, Any], name: str) -> float | None:
    """A figure of the progress; other values, which a hand-made folder may hold, count as none."""
    value = progress.get(name)
    return float(value) if isinstance(value, int | float) and is_figure(value) else None


def losses(progress: dict[str, Any]) -> list[float]:
    """The last losses of a training."""
    found = progress.get("losses")
    return [float(value) for value in found if is_figure(value)] if isinstance(found, list) else []
