"""A home whose scheduler, database and engine can be killed between any two statements.

`Killed` stands for kill -9: it is no Exception, so nothing of the scheduler runs after it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from kdscale.service.database.connection import Database, open_database
from kdscale.service.database.runs import NewRun, Run, Runs
from kdscale.service.engines.engine import Job, JobState
from kdscale.service.ids import new_run_id
from kdscale.service.scheduler.loop import Scheduler
from kdscale.service.scheduler.machine import Machine
from kdscale.service.settings import ServiceSettings

CONFIG = {"name": "some", "teacher": {"path": "somewhere"}, "prune": {"ffn": 64}}


class Killed(BaseException):
    """kill -9 of the service."""


class Fate:
    """When the service is killed: at the instant of a name, or after so many instants; None for never."""

    def __init__(self) -> None:
        self.at: str | int | None = None

    def instant(self, name: str) -> None:
        if isinstance(self.at, int):
            self.at -= 1
        if self.at in (name, 0):
            self.at = None
            raise Killed


class MortalDatabase(Database):
    """A database of a service that may be killed before and after any of its transactions."""

    def __init__(self, database: Database, fate: Fate):
        super().__init__(database.engine)
        self._fate = fate

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        self._fate.instant("begin")
        with super().begin() as connection:
            yield connection
        self._fate.instant("committed")


class FakeEngine:
    """Jobs in a dictionary, which outlives the service as processes do."""

    def __init__(self, name: str = "local", fate: Fate | None = None) -> None:
        self.name, self._fate = name, fate or Fate()
        self.jobs: dict[str, JobState] = {}
        self.starts: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.given: dict[str, Job] = {}
        self.refuses: Exception | None = None

    def submit(self, job: Job) -> str:
        self._fate.instant("submit before")
        if self.refuses is not None:
            raise self.refuses
        handle = f"{job.run_id}/{job.attempt}"
        if handle not in self.jobs:
            self.starts[handle] += 1
            self.jobs[handle], self.given[handle] = JobState("running"), job
        self._fate.instant("submit after")
        return handle

    def state(self, handle: str) -> JobState:
        self._fate.instant("state before")
        return self.jobs[handle]

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        return b"error: something\n"

    def cancel(self, handle: str, *, grace: float) -> None:
        self._fate.instant("cancel before")
        self.told[handle] += 1
        self._fate.instant("cancel after")

    def requeue(self, handle: str, job: Job) -> str:
        return self.submit(job)

    @property
    def alive(self) -> list[str]:
        return [handle for handle, job in self.jobs.items() if job.phase == "running"]


class Service:
    """A home with a scheduler that can be killed and made again."""

    def __init__(self, home: Path, machine: Machine | None = None, **options: Any):
        self.now = itertools.count(1000)
        self.time = 1000.0
        self.settings = ServiceSettings(home=str(home), **{"retry_seconds": 30.0, "tries": 3, **options})
        self.fate = Fate()
        self.machine, self.engine = machine or Machine(2), FakeEngine(fate=self.fate)
        self.database: Database = MortalDatabase(open_database(self.settings), self.fate)
        self.runs = Runs(self.database, self.clock)
        self.scheduler = self.start()

    def clock(self) -> float:
        return self.time

    def start(self, engines: Mapping[str, Any] | None = None) -> Scheduler:
        return Scheduler(self.settings, self.database, engines or {"local": self.engine}, self.clock, self.machine)

    def step(self, dies: str | int | None = None) -> None:
        """One step; with `dies` the service is killed in it and starts again."""
        self.fate.at = dies
        try:
            self.scheduler.step()
        except Killed:
            self.scheduler = self.start()
        self.fate.at = None

    def add(self, **fields: Any) -> Run:
        run_id = new_run_id(next(self.now))
        values = {"name": "some", "owner": "ada", "config": CONFIG, "folder": self.settings.runs / run_id}
        return self.runs.add(NewRun(**{**values, "id": run_id, **fields}))

    def end(self, run: Run, code: int | None) -> None:
        state = JobState("lost", reason="gone") if code is None else JobState("ended", code)
        self.engine.jobs[f"{run.id}/{self.get(run).attempt}"] = state

    def get(self, run: Run) -> Run:
        return self.runs.get(run.id)
