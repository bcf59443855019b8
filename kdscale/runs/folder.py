"""The run folder: where everything about one run lies, who may write there, and what happened when.

run/  config.yaml (resolved)  events.jsonl  status.json  logs/  stages/ (one manifest a finished stage)
  work/ (what unfinished stages resume from)
  data/  importance/  speed.json (timings of shapes)  plan.json  pruned/  repair.json (what compensation won back)
  checkpoints/  student/  eval/  report/  steps/ (a run folder for each step before the last)
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kdscale.config.load import Difference, config_differences, dump_config, load_config, may_change
from kdscale.config.root import Config
from kdscale.config.targets import TEACHER_TOKEN
from kdscale.errors import ConfigError, RunFolderError
from kdscale.files import explain_os_errors, read_json, remove_leftovers, write_json, write_text


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage leaves; `path` is relative to the run folder."""

    path: str


DATA = Artifact("data")
IMPORTANCE = Artifact("importance")
PLAN = Artifact("plan.json")
PRUNED = Artifact("pruned")
PRUNED_CONFIG = Artifact("pruned/config.json")
REPAIR = Artifact("repair.json")
CHECKPOINTS = Artifact("checkpoints")
STUDENT = Artifact("student")
EVAL = Artifact("eval")
REPORT = Artifact("report")
METRICS = Artifact("logs/metrics.jsonl")
BAD_BATCHES = Artifact("logs/bad_batches.jsonl")
TENSORBOARD = Artifact("logs/tensorboard")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RunFolder:
    """Paths and small files of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.events = path / "events.jsonl"
        self.status = path / "status.json"
        self.logs = path / "logs"
        self.stages = path / "stages"
        self.work = path / "work"
        self.speed = path / "speed.json"
        self.steps = path / "steps"
        self.data, self.importance, self.plan = self.at(DATA), self.at(IMPORTANCE), self.at(PLAN)
        self.pruned, self.repair, self.student = self.at(PRUNED), self.at(REPAIR), self.at(STUDENT)
        self.checkpoints, self.metrics = self.at(CHECKPOINTS), self.at(METRICS)
        self.eval, self.report = self.at(EVAL), self.at(REPORT)

    def at(self, artifact: Artifact) -> Path:
        """Where an artifact of this run is, or will be."""
        return self.path / artifact.path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process and clear what a killed one left half-written in it.

        Raises RunFolderError when the folder is in use, read-only or not a folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"run folder {self.path}", expected="a folder", got="a file")
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(handle):
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
                raise RunFolderError(
                    f"run folder {self.path} is in use by process {owner}",
                    hint="wait for it, stop it, or give this run its own folder with --set run_dir=...",
                )
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
            remove_leftovers(self.path)
            yield
        finally:
            os.close(handle)

    def in_use(self) -> bool:
        """Whether a process holds the folder now."""
        try:
            handle = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(handle)
        finally:
            os.close(handle)

    def adopt_config(self, config: Config, accept_changes: bool) -> list[Difference]:
        """Store the resolved config; returns the fields that changed since the folder's last run.

        Raises RunFolderError when the folder belongs to another config and the change was not accepted. The number of
        ranks, and other settings that the student does not depend on, may change without. Before any stage has begun
        there is nothing to protect, and a corrected config simply takes the place of the first.
        """
        changes: list[Difference] = []
        if self.config.exists():
            try:
                old = load_config(self.config)
            except ConfigError as error:
                raise RunFolderError(
                    f"{self.config} was not written by this version of kdscale",
                    got=str(error),
                    hint="use another run_dir",
                ) from error
            changes = config_differences(old.resolved(), config.resolved())
            refused = [change for change in changes if not may_change(change.field)]
            if refused and not accept_changes and self.stages.exists():
                listed = "\n".join(f"  - {change}" for change in refused)
                raise RunFolderError(
                    f"run folder {self.path} belongs to another config; it differs in\n{listed}",
                    hint="choose another folder with --set run_dir=..., or redo what they touch with --accept-changes",
                )
        elif self._is_foreign():
            raise RunFolderError(
                f"run folder {self.path} holds files that are not a run's", expected="an empty or new folder"
            )
        if changes or not self.config.exists():
            write_text(self.config, dump_config(config))
        return changes

    def _is_foreign(self) -> bool:
        # a launcher writes the ranks' logs before the first rank gets here
        return any(item.name not in (".lock", "logs", TEACHER_TOKEN) for item in self.path.iterdir())

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: what happened, when, in which process."""
        with explain_os_errors(self.events), self.events.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": now(), "event": kind, "pid": os.getpid(), **fields}) + "\n")

    def set_status(self, stage: str, state: str, **fields: Any) -> None:
        """Record a stage's state (running, done, failed, interrupted) for `kdscale status` and other watchers."""
        current = read_json(self.status, RunFolderError) if self.status.exists() else {"stages": {}}
        current["stages"][stage] = {"state": state, "time": now(), **fields}
        write_json(self.status, current)
        self.event(state, stage=stage, **fields)
