"""How far a run is, by its folder alone: each stage, the training, and what is left of it. Loads no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.pipeline.stage import Stage
from kdscale.pipeline.stages.registry import STAGES, stages_of
from kdscale.runs.folder import RunFolder

LAST_STEPS = 50  # whose median time a step tells how long the rest takes


@dataclass(frozen=True)
class StageProgress:
    """One stage of a run.

    `state`: waiting, running, done, failed, interrupted, or stopped where it should be running and no process is.
    `seconds`: how long it took. `since`: when it came into its state, as the run wrote it.
    """

    name: str
    state: str = "waiting"
    seconds: float | None = None
    since: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def seconds_so_far(self, now: datetime) -> float | None:
        """How long a running stage has been running; None where that is not known."""
        try:
            return (now - datetime.fromisoformat(self.since)).total_seconds()
        except (ValueError, TypeError):  # not as this version writes it
            return None


@dataclass(frozen=True)
class TrainingProgress:
    """A training that has begun: its last row, its steps in all, and the seconds that the rest takes (None: done)."""

    last: dict[str, Any]
    steps: int
    seconds_left: float | None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.last.get("step", 0))


def config_of(run: RunFolder) -> Config | None:
    """The run's config; None in a folder of another version, which still has a status."""
    try:
        found = run.config.stat()
    except OSError:
        return None
    return _config(run.config, (found.st_mtime_ns, found.st_size, found.st_ino))


@lru_cache(maxsize=512)
def _config(path: Path, version: tuple[int, ...]) -> Config | None:
    """The config of a file as it is now: whoever watches runs asks every second, and YAML takes a while to read."""
    try:
        return load_config(path)
    except ConfigError:
        return None


def rows_of(config: Config | None) -> list[Stage]:
    """The stages of a run; those that every run has, where its config cannot be read."""
    return stages_of(config) if config is not None else [stage for stage in STAGES.values() if not stage.only_with]


def stage_progress(
    run: RunFolder, stages: Sequence[Stage], alive: bool, say: Callable[[str], None]
) -> list[StageProgress]:
    """How far each of the stages is; `alive`: whether a process holds the run folder."""
    recorded, found = run.recorded(say), []
    for stage in stages:
        entry = recorded.get(stage.name)
        if entry is None:
            found.append(StageProgress(stage.name))
            continue
        state = "stopped" if entry["state"] == "running" and not alive else entry["state"]
        found.append(
            StageProgress(
                stage.name, state, entry.get("seconds"), entry.get("time", ""), entry.get("facts", {}),
                entry.get("reason", ""),
            )
        )  # fmt: skip
    return found


def training_progress(config: Config, trained: Sequence[dict[str, Any]]) -> TrainingProgress | None:
    """The training by its rows, of which the last ones suffice; None before the first."""
    if not trained:
        return None
    settings, last = config.distill, trained[-1]
    # as distill.schedule counts them, which would load torch
    steps, done = -(-settings.tokens // (settings.global_batch * settings.seq_len)), last.get("step", 0)
    seconds = [row["seconds"] for row in trained[-LAST_STEPS:] if "seconds" in row]
    left = (steps - done) * statistics.median(seconds) if seconds and 0 < done < steps else None
    return TrainingProgress(last, steps, left)
