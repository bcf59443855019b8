"""Run folders of the command line under the folders that the service may look into."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pwd import getpwuid

from kdscale.pipeline.progress import config_of, rows_of, stage_progress
from kdscale.runs.folder import RunFolder
from kdscale.service.states import RunState

_DEEPEST = 4
_MOST_FOLDERS = 20_000  # that are looked into in one pass


@dataclass(frozen=True)
class Found:
    """How a run that somebody started on the command line is."""

    state: RunState
    reason: str


def find_runs(roots: Sequence[Path], besides: Path) -> Iterator[Path]:
    """The run folders under `roots`, a few levels deep, without those in `besides`; links are not followed."""
    waiting = [(root.resolve(), 0) for root in roots]
    looked, met = 0, set[Path]()
    while waiting and looked < _MOST_FOLDERS:
        folder, depth = waiting.pop(0)
        if folder in met or folder == besides.resolve():
            continue
        met.add(folder)
        looked += 1
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # forbidden, or gone by now
            continue
        if {"config.yaml", "events.jsonl"} <= {entry.name for entry in entries}:
            yield folder
        elif depth < _DEEPEST:
            waiting += [
                (Path(entry.path), depth + 1)
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]


def how_it_is(folder: Path) -> Found:
    """The state of a run by its folder alone: running while a process holds it, and done when all its stages are."""
    run = RunFolder(folder)
    if run.in_use():
        return Found("running", "")
    stages = stage_progress(run, rows_of(config_of(run)), False, lambda message: None)
    if all(stage.state == "done" for stage in stages):
        return Found("succeeded", "")
    last = next((stage for stage in reversed(stages) if stage.state not in ("waiting", "done")), None)
    if last is None:
        return Found("failed", "stopped before the end")
    return Found("failed", last.reason or f"stopped in the stage {last.name}")


def owner_of(folder: Path) -> str:
    """The user whose folder it is, by name or by number."""
    number = folder.stat().st_uid
    try:
        return getpwuid(number).pw_name
    except KeyError:
        return str(number)
