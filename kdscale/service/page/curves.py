"""The curves of a run: loss, validation and throughput, thinned to what a drawing can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from starlette.datastructures import State

from kdscale.runs.folder import METRICS
from kdscale.service.api.metrics import training_logs_of
from kdscale.service.page.charts import Chart, Line, Point, line_chart, smoothed

_MOST_POINTS = 512
Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]


@dataclass(frozen=True)
class Curves:
    """The curves of one run. `x_title` says what they are over."""

    loss: Sequence[Point] = ()
    validation: Sequence[Point] = ()
    validation_measure: str = "loss"
    speed: Sequence[Point] = ()  # tokens a second
    x_title: str = "step"

    def charts(self) -> list[Chart]:
        """Loss, validation and throughput: those that have points."""
        loss = [Line("each step", self.loss, faint=True), Line("mean", smoothed(self.loss))]
        validation = [Line(self.validation_measure, self.validation, "line-b", dots=True)]
        speed = [
            Line("each step", self.speed, "line-c", faint=True),
            Line("mean", smoothed(self.speed), "line-c"),
        ]
        until = max((points[-1][0] for points in (self.loss, self.validation, self.speed) if points), default=0.0)
        title, log = f"Validation {self.validation_measure}", self.validation_measure == "perplexity"
        drawn = [
            line_chart("Training loss", loss, self.x_title, until=until),
            line_chart(title, validation, self.x_title, log=log, until=until),
            line_chart("Tokens a second", speed, self.x_title, until=until),
        ]
        return [chart for chart in drawn if chart]


def curves_of_run(state: State, folder: Path) -> Curves:
    """The curves of the run in this folder; empty ones where it has not trained."""
    return curves(training_logs_of(state).read(folder / METRICS.path).series)


def curves(series: Series) -> Curves:
    """The curves in the series of a training log, over the tokens trained on where the log has them."""
    steps, tokens = _arrays(series, "train/tokens")
    trained, losses = _arrays(series, "train/loss")
    timed, speeds = _arrays(series, "train/tokens_per_second")
    measure = "perplexity" if "validation/perplexity" in series else "loss"
    checked, values = _arrays(series, f"validation/{measure}")
    if not len(steps):
        return Curves(_thinned(trained, losses), _thinned(checked, values), measure, _thinned(timed, speeds))

    def at(own: np.ndarray) -> np.ndarray:
        # a validation counts the tokens it was measured on: it stands at those trained on by then, none at step 0
        return np.interp(own, [0, *steps], [0, *tokens])

    return Curves(
        _thinned(at(trained), losses), _thinned(at(checked), values), measure, _thinned(at(timed), speeds),
        "training tokens",
    )  # fmt: skip


def _arrays(series: Series, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a series; another thread may be adding to them."""
    steps, values = (np.array(part, dtype=np.float64) for part in series.get(name, ((), ())))
    both = min(len(steps), len(values))
    return steps[:both], values[:both]


def _thinned(x: np.ndarray, y: np.ndarray) -> list[Point]:
    """At most `_MOST_POINTS`: means of as many neighbours each, at the last x of them."""
    if len(x) <= _MOST_POINTS:
        return list(zip(x.tolist(), y.tolist(), strict=True))
    ends = np.linspace(0, len(x), _MOST_POINTS + 1).astype(int)
    means = np.add.reduceat(y, ends[:-1]) / np.diff(ends)
    return list(zip(x[ends[1:] - 1].tolist(), means.tolist(), strict=True))
