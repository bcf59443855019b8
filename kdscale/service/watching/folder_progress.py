"""A run folder as the service tells it: one dictionary of plain values, and what has happened since the last look.

stage               the stage that runs, or else the last one that began; None before the first
stages              [{name, step, state, seconds, since, reason}], those of the steps first, with the step's name
share               how much of the run is done, 0 to 1, in which a distillation counts as much as all else
step, steps, tokens, loss, tokens_per_second, seconds_left, losses (the last ones)   of the training, when it began
moved               when anything last changed in the folder, in seconds since 1970
read                up to which byte each events.jsonl was read; `validated`, `spiked`: up to which step those were
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kdscale.config.root import Config
from kdscale.errors import FileError
from kdscale.files import open_plain, parse_json
from kdscale.pipeline.progress import config_of, rows_of, stage_progress, training_progress
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import is_figure, last_metrics
from kdscale.service.database.observed import Seen

_LOSSES = 60
_DISTILL, _DISTILL_SHARE = "distill", 0.5
_MOST_EVENT_BYTES = 1 << 20  # that are read at once
_LONGEST = 2000  # characters of a reason
_MOST_ENTRIES = 4096  # that are looked at for the time of the last change
_FIGURES = ("tokens", "loss", "tokens_per_second")


@dataclass(frozen=True)
class Look:
    """One look at a run folder."""

    progress: dict[str, Any]
    seen: list[Seen]


def last_change(folder: Path, more: Path | None = None) -> float:
    """When anything two levels deep in a run folder, or in one of its steps, last changed; 0.0 where there is nothing.

    `more` is a file outside that changes too.
    """
    newest, looked = 0.0, 0
    for found in _entries(folder, 2):
        newest, looked = max(newest, found), looked + 1
        if looked > _MOST_ENTRIES:
            break
    for step in sorted((folder / "steps").glob("*")):
        newest = max(newest, *_entries(step, 2), 0.0)
    if more is not None:
        with suppress(OSError):
            newest = max(newest, more.stat().st_mtime)
    return newest


def _entries(folder: Path, depth: int) -> Iterator[float]:
    """Times of change of what is in a folder; links are not followed."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # not there, or gone by now
        return
    for entry in entries:
        with suppress(OSError):
            if entry.name != ".lock":
                yield entry.stat(follow_symlinks=False).st_mtime
            if depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), depth - 1)


def look(folder: Path, before: Mapping[str, Any], moved: float, alive: bool) -> Look:
    """Read a run folder. `before` is the progress of the last look; `alive`: whether a process holds the folder."""
    outer = RunFolder(folder)
    places = [(step.parent.name, RunFolder(step.parent)) for step in sorted(outer.steps.glob("*/config.yaml"))]
    configs = {run.path: config_of(run) for _, run in (*places, ("", outer))}
    stages: list[dict[str, Any]] = []
    for name, run in (*places, ("", outer)):
        rows = [stage for stage in rows_of(configs[run.path]) if stage.in_steps or not name]
        stages += [
            {
                "name": stage.name, "step": name, "state": stage.state, "seconds": stage.seconds, "since": stage.since,
                "reason": next(iter(stage.reason.splitlines()), "")[:_LONGEST],
            }
            for stage in stage_progress(run, rows, alive, _ignore)
        ]  # fmt: skip
    trained = max((run for _, run in (*places, ("", outer))), key=lambda run: _changed(run.metrics))
    rows_read = last_metrics(trained.metrics)
    progress: dict[str, Any] = {"stage": _current(stages), "stages": stages, "moved": moved}
    progress |= _training(configs[trained.path], rows_read)
    progress["share"] = _share(stages, progress["step"] / progress["steps"] if progress.get("steps") else 0.0)
    read, seen = _events(folder, [*places, ("", outer)], before.get("read"))
    validated = before.get("validated") if before.get("trained_in") == trained.path.name else None
    last, validations = _validations(rows_read, validated, moved)
    spiked = before.get("spiked") if before.get("trained_in") == trained.path.name else None
    last_spike, spikes = _spikes(rows_read, spiked, moved)
    progress |= {"read": read, "validated": last, "spiked": last_spike, "trained_in": trained.path.name}
    return Look(progress, seen + validations + spikes)


def _ignore(message: str) -> None:
    """A file that is damaged is the run's to report; the service shows what it can."""


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _current(stages: list[dict[str, Any]]) -> str | None:
    """The stage that runs, or the last one that began."""
    begun = [stage["name"] for stage in stages if stage["state"] != "waiting"]
    running = [stage["name"] for stage in stages if stage["state"] == "running"]
    return (running or begun or [None])[-1]


def _share(stages: list[dict[str, Any]], of_training: float) -> float:
    """How much is done; the distillation's part grows with its steps."""
    weights = {True: 0.0, False: 0.0}
    done = dict(weights)
    for stage in stages:
        distils = stage["name"] == _DISTILL
        weights[distils] += 1.0
        if stage["state"] == "done":
            done[distils] += 1.0
        elif distils and stage["state"] != "waiting":
            done[distils] += min(1.0, of_training)
    parts = [(_DISTILL_SHARE if distils else 1.0 - _DISTILL_SHARE, distils) for distils in weights if weights[distils]]
    total = sum(part for part, _ in parts)
    return round(sum(part * done[distils] / weights[distils] for part, distils in parts) / total, 4) if total else 0.0


def _training(config: Config | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    trained = [row for row in rows if row["kind"] == "train"]
    if not trained:
        return {}
    last = trained[-1]
    found: dict[str, Any] = {"step": last["step"], **{name: last[name] for name in _FIGURES if name in last}}
    found["losses"] = [row["loss"] for row in trained[-_LOSSES:] if "loss" in row]
    if config is not None and (training := training_progress(config, trained)) is not None:
        found |= {"steps": training.steps, "seconds_left": training.seconds_left}
    return found


def _events(folder: Path, places: list[tuple[str, RunFolder]], before: Any) -> tuple[dict[str, int], list[Seen]]:
    """What was appended to each events.jsonl since it was last read, and up to where it was read now."""
    positions: dict[str, int] = {}
    seen: list[Seen] = []
    for step, run in places:
        name = run.events.relative_to(folder).as_posix()
        start = before.get(name, 0) if isinstance(before, dict) else 0
        try:
            with open_plain(run.events) as stream:
                size = stream.seek(0, os.SEEK_END)
                start = start if isinstance(start, int) and 0 <= start <= size else 0
                stream.seek(start)
                content = stream.read(_MOST_EVENT_BYTES)
        except OSError:
            continue
        whole = content[: content.rfind(b"\n") + 1]
        positions[name] = start + len(whole)
        for line in whole.splitlines():
            with suppress(FileError, UnicodeDecodeError, ValueError, KeyError, TypeError):  # damaged: left out
                seen.append(_seen(parse_json(line.decode(), "event", expect=dict), step))
    return positions, sorted(seen, key=lambda item: item.time)


def _seen(row: Mapping[str, Any], step: str) -> Seen:
    when = datetime.fromisoformat(row["time"]).timestamp()
    data = {"stage": str(row["stage"]), "state": str(row["event"])} | ({"step": step} if step else {})
    data |= {name: row[name] for name in ("seconds", "facts") if name in row}
    data |= {"reason": str(row["reason"])[:_LONGEST]} if "reason" in row else {}
    return Seen("stage", when, data)


def _validations(rows: list[dict[str, Any]], before: Any, now: float) -> tuple[int, list[Seen]]:
    """Validations behind the last step that was seen, of which a run that goes on makes some again."""
    last, seen = before if isinstance(before, int) else -1, []
    for row in rows:
        if row["kind"] == "validation" and row["step"] > last:
            last = row["step"]
            seen.append(Seen("validation", now, {name: value for name, value in row.items() if is_figure(value)}))
    return last, seen


def _spikes(rows: list[dict[str, Any]], before: Any, now: float) -> tuple[int, list[Seen]]:
    """Steps whose loss was out of line, behind the last one that was seen."""
    last, seen = before if isinstance(before, int) else -1, []
    for row in rows:
        if row["kind"] == "train" and row.get("spike") and row["step"] > last:
            last = row["step"]
            names = {"step": "step", "loss": "loss", "spike_limit": "limit"}
            seen.append(Seen("spike", now, {told: row[name] for name, told in names.items() if name in row}))
    return last, seen
