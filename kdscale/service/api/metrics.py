"""Training metrics as series: read on as the log grows, and thinned so that spikes stay to be seen."""

from __future__ import annotations

import os
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.datastructures import State

from kdscale.runs.folder import METRICS
from kdscale.runs.metrics_log import is_figure, parse_row
from kdscale.service.api.dependencies import READ, FoundRun, Number
from kdscale.service.api.schemas import Metrics, Series
from kdscale.service.regular_files import open_regular

router = APIRouter(prefix="/v1/runs", tags=["metrics"], dependencies=[READ])
_CHUNK = 16 << 20  # bytes that are read at once
_MOST_LOGS, _MOST_FIGURES = 64, 20_000_000  # that are kept in memory, of all logs
_NOT_SHOWN = ("step",)


@router.get("/{run_id}/metrics")
def metrics(
    run: FoundRun,
    request: Request,
    names: Annotated[
        str, Query(max_length=2000, description="Comma-separated, such as train/loss or loss; all when left out.")
    ] = "",
    since_step: Number = 0,
    max_points: Annotated[int, Query(ge=4, le=100_000, description="Of each series.")] = 1000,
) -> Metrics:
    """The figures of a training over its steps."""
    log = training_logs_of(request.app.state).read(run.folder / METRICS.path)
    wanted = {name.strip() for name in names.split(",")} - {""}
    shown = [name for name in list(log.series) if not wanted or wanted & {name, name.partition("/")[2]}]
    return Metrics(
        series=[_series(name, *log.series[name], since_step, max_points) for name in shown], names=list(log.series),
        last_step=log.last_step,
    )  # fmt: skip


def _series(name: str, steps: Sequence[int], values: Sequence[float], since: int, most: int) -> Series:
    start = bisect_left(steps, since)
    steps, values = steps[start:], values[start:]
    kept = thin(values, most)
    return Series(
        name=name, steps=[steps[index] for index in kept], values=[values[index] for index in kept],
        thinned=len(kept) < len(values),
    )  # fmt: skip


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` (4 or more) values: the first, the last, and the lowest and highest of each stretch."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches, inner = (most - 2) // 2, len(values) - 2
    kept = [0]
    for number in range(stretches):
        indices = range(1 + inner * number // stretches, 1 + inner * (number + 1) // stretches)
        low, high = min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)
        kept += sorted({low, high})
    return [*kept, len(values) - 1]


class _Log:
    """One log, and how far it has been read."""

    def __init__(self) -> None:
        self._begin((0, 0))

    def _begin(self, file: tuple[int, int]) -> None:
        self._file, self._offset = file, 0
        self.series: dict[str, tuple[array[int], array[float]]] = {}
        self.last_step: int | None = None

    @property
    def figures(self) -> int:
        """How many it holds."""
        return sum(len(values) for _, values in self.series.values())

    def read_on(self, path: Path) -> None:
        """Take in the rows that were added; everything anew where the file was replaced or cut."""
        try:
            stream = open_regular(path)
        except OSError:  # not there yet
            return
        with stream:
            found = os.fstat(stream.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                self._begin((found.st_dev, found.st_ino))
            stream.seek(self._offset)
            rest = b""
            while chunk := stream.read(_CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(line)
            self._offset = stream.tell() - len(rest)  # a line that is being written is read next time

    def _take(self, line: bytes) -> None:
        if (row := parse_row(line)) is None:
            return
        kind, step = str(row["kind"]), row["step"]
        self.last_step = max(step, self.last_step or 0)
        for name, value in row.items():
            if name not in _NOT_SHOWN and is_figure(value):
                steps, values = self.series.setdefault(f"{kind}/{name}", (array("q"), array("d")))
                steps.append(step)
                values.append(value)


class TrainingLogs:
    """The logs that were asked for last. Threads share one."""

    def __init__(self) -> None:
        self._logs: OrderedDict[Path, _Log] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path) -> _Log:
        """The log as it is now; empty where there is none."""
        with self._lock:
            log = self._logs.pop(path, None) or _Log()
            log.read_on(path)
            self._logs[path] = log
            while len(self._logs) > 1 and (
                len(self._logs) > _MOST_LOGS or sum(one.figures for one in self._logs.values()) > _MOST_FIGURES
            ):
                self._logs.popitem(last=False)
            return log


def training_logs_of(state: State) -> TrainingLogs:
    """The logs that an application keeps."""
    if getattr(state, "training_logs", None) is None:
        state.training_logs = TrainingLogs()
    found: TrainingLogs = state.training_logs
    return found
