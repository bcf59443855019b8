"""The run folder: where everything about one run lies, who may write there, and what happened when.

run/  config.yaml (resolved)  events.jsonl  status.json  logs/  stages/ (one manifest a finished stage)
  work/ (what unfinished stages resume from)
  responses/ (a journal of all answers, and those that are kept)
  data/  corrected/ (the teacher after its correction)  importance/  speed.json (timings of shapes)  plan.json  pruned/
  repair.json (what compensation won back)  targets/ (stored targets, or a link to where they are)  checkpoints/
  on-policy/ (what the student wrote while it was trained)
  student/  quantized/ (the student in forms with fewer bits)  eval/
  downstream/ (scores on tasks)  bias/  report/
  steps/ (a run folder for each step before the last)
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.config.load import Difference, config_differences, dump_config, load_config, may_change
from kdscale.config.root import Config
from kdscale.errors import ConfigError, FileError, RunFolderError
from kdscale.files import (
    explain_os_errors,
    is_plain_or_absent,
    read_json,
    read_own_json,
    remove_leftovers,
    set_aside,
    write_json,
    write_text,
)
from kdscale.runtime.locks import LOOK_SECONDS, is_locked, try_lock


@dataclass(frozen=True)
class Artifact:
    """A file or folder that a stage leaves; `path` is relative to the run folder.

    `only`: globs of the files in it that a stage reads, where that is not all of them.
    """

    path: str
    only: tuple[str, ...] | None = None


RESPONSES = Artifact("responses")
KEPT_RESPONSES = Artifact("responses/responses.jsonl")
DATA = Artifact("data")
IMPORTANCE = Artifact("importance")
PLAN = Artifact("plan.json")
MERGED = Artifact("merged")  # the teacher with its adapters in its weights
CORRECTED = Artifact("corrected")
PRUNED = Artifact("pruned")
# What a model's values depend on. The tokenizer's files matter besides where text is read; licences, notices and chat
# templates are copied along and decide nothing.
WEIGHTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config.json",
)  # fmt: skip
CORRECTED_WEIGHTS = Artifact("corrected", WEIGHTS)
PRUNED_WEIGHTS = Artifact("pruned", WEIGHTS)
PRUNED_CONFIG = Artifact("pruned/config.json")
REPAIR = Artifact("repair.json")
TARGETS = Artifact("targets")
TARGETS_HEADER = Artifact("targets", ("store.json",))  # it says which targets there are
CHECKPOINTS = Artifact("checkpoints")
ON_POLICY = Artifact("on-policy")  # what the student wrote while it was trained: a journal, which any run may lack
STUDENT = Artifact("student")
ADAPTER = Artifact("adapter")  # of distill.lora, as peft reads it; what is in the student is merged
STUDENT_WEIGHTS = Artifact("student", WEIGHTS)
CARD = "README.md"  # of a model's folder: people edit it, and nothing is computed from it
STUDENT_CARD = Artifact(f"student/{CARD}")
QUANTIZED = Artifact("quantized")
QUANTIZED_WEIGHTS = Artifact("quantized", tuple(f"*/{pattern}" for pattern in WEIGHTS))
EVAL, EVAL_FILE = Artifact("eval"), "eval.json"  # the folder, and in it the file with all figures
DOWNSTREAM, DOWNSTREAM_FILE = Artifact("downstream"), "downstream.json"
BIAS, BIAS_FILE = Artifact("bias"), "bias.json"
REPORT = Artifact("report")
METRICS = Artifact("logs/metrics.jsonl")
BAD_BATCHES = Artifact("logs/bad_batches.jsonl")
TENSORBOARD = Artifact("logs/tensorboard")
KERNELS = Artifact("logs/kernels.json")  # why the distillation did without compiled kernels; absent where it did not

ALIGNMENT = Artifact("logs/alignment.json")  # how much the student has tokens for of what teachers with others say


def training_metrics(name: str) -> Artifact:
    """What is kept of the metrics of a training inside the run: of the teacher's correction, or of a form's."""
    return Artifact(f"logs/{name}.jsonl")


CORRECTION_METRICS = training_metrics("correct")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class StageStatus(_Record):
    """What status.json says about one stage."""

    state: Literal["running", "done", "failed", "interrupted"]
    time: str = ""
    seconds: float = 0.0
    facts: dict[str, str | int | float] = {}
    reason: str = ""


class Status(_Record):
    """status.json."""

    stages: dict[str, StageStatus]


class StageInputs(_Record):
    """What a stage was made from: settings, what was derived from them, and digests of files by artifact and name."""

    config: dict[str, Any]
    files: dict[str, dict[str, str]]
    derived: dict[str, Any] = {}


class Manifest(_Record):
    """The manifest of a finished stage: what it was made from and what it left."""

    made_from: StageInputs
    outputs: dict[str, dict[str, str]]
    facts: dict[str, str | int | float]
    # digests of the files of the larger model that are copied to the output and decide nothing else
    copied: dict[str, str] = {}
    seconds: float = 0.0


def fits(record: type[BaseModel]) -> Callable[[Any], bool]:
    """A check of whether a JSON value is such a record."""

    def check(value: Any) -> bool:
        try:
            record.model_validate(value)
        except ValidationError:
            return False
        return True

    return check


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
        self.responses = self.at(RESPONSES)
        self.data, self.importance, self.plan = self.at(DATA), self.at(IMPORTANCE), self.at(PLAN)
        self.pruned, self.repair, self.student = self.at(PRUNED), self.at(REPAIR), self.at(STUDENT)
        self.quantized = self.at(QUANTIZED)
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
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise RunFolderError(f"{self.path / '.lock'} is not a regular file", hint="remove it")
            if not try_lock(handle, LOOK_SECONDS):
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
        return is_locked(self.path / ".lock")

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

    def recorded(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The stages of status.json, by name; a damaged file counts as none, is left where it is and reported."""
        if not os.path.lexists(self.status):
            return {}
        try:
            return dict(Status.model_validate(read_json(self.status)).model_dump(exclude_unset=True)["stages"])
        except (FileError, ValidationError):
            say(f"warning: {self.status} is damaged; kdscale run makes it again")
            return {}

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to events.jsonl: what happened, when, in which process."""
        if not is_plain_or_absent(self.events):
            set_aside(self.events)
        with explain_os_errors(self.events), self.events.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": now(), "event": kind, "pid": os.getpid(), **fields}) + "\n")

    def set_status(self, stage: str, state: str, **fields: Any) -> None:
        """Record a stage's state (running, done, failed, interrupted) for `kdscale status` and other watchers."""
        current = read_own_json(self.status, fits(Status)) or {"stages": {}}
        current["stages"][stage] = {"state": state, "time": now(), **fields}
        write_json(self.status, current)
        self.event(state, stage=stage, **fields)
