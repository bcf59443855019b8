"""Keeps the database in step with run folders: progress and events of runs, and runs of the command line."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kdscale.errors import KdscaleError
from kdscale.pipeline.progress import config_of
from kdscale.runs.folder import RunFolder
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.folders import write_run_folder
from kdscale.service.database.observed import Observations
from kdscale.service.database.runs import LONGEST_REASON, NewRun, Run, Runs
from kdscale.service.engines.supervisor import OUTPUT
from kdscale.service.ids import new_run_id
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, FINAL, STATES, RunState
from kdscale.service.watching.discovery import find_runs, how_it_is, owner_of
from kdscale.service.watching.folder_progress import last_change, look
from kdscale.service.watching.state_files import write_state

COMMAND_LINE = "command line"
_SEARCH_SECONDS = 60.0
_AT_WORK = {"running", "pausing", "cancelling"}
_log = logging.getLogger(__name__)


class Watcher:
    """Looks at run folders. `clock` gives seconds since 1970. What it remembers saves work and decides nothing."""

    def __init__(self, settings: ServiceSettings, database: Database, clock: Callable[[], float] = time.time):
        self._settings, self._clock = settings, clock
        self._runs, self._events = Runs(database, clock), Events(database, clock)
        self._observations = Observations(database, clock)
        self._looked: dict[str, tuple[RunState, int, float]] = {}  # at which state, attempt and change of a run
        self._seq: int | None = None  # events up to here are in the state files
        self._unkept: dict[str, None] = {}  # runs whose state is still to be written
        self._searched = float("-inf")
        self._stop = threading.Event()

    def run_forever(self, stop: threading.Event, leads: Callable[[], bool]) -> None:
        """One pass after another until `stop` is set, while this process is the one that schedules."""
        self._stop = stop
        while not stop.is_set():
            try:
                if leads():
                    self.step()
            except Exception:  # noqa: BLE001 (it is tried again, and the log has it)
                _log.exception("a look at the run folders failed; it is tried again")
            stop.wait(self._settings.poll_seconds)

    def step(self) -> None:
        """One pass over all runs that may have changed; from time to time also a search for new ones."""
        first = self._seq is None
        self._keep_states()
        # in the first pass all of them: they may have ended while nobody looked
        active = self._runs.in_states(STATES if first else ACTIVE, origin=None)
        active = [run for run in active if run.origin == COMMAND_LINE or self._settings.has_made(run.folder)]
        rested = [run_id for run_id in self._looked if run_id not in {run.id for run in active}]
        for run in active:
            if self._stop.is_set():  # the first pass over many runs takes a while
                return
            self._guarded(self._look, run)
        for run_id in rested:  # once more, at its end
            if (ended := self._runs.find(run_id)) is not None:
                self._guarded(self._look, ended)
            self._looked.pop(run_id, None)
        if self._clock() - self._searched >= _SEARCH_SECONDS:
            self._searched = self._clock()
            self._search()

    def _guarded(self, act: Callable[[Run], None], run: Run) -> None:
        try:
            act(run)
        except (KdscaleError, OSError) as error:
            _log.warning("run %s cannot be looked at: %s", run.id, error)

    def _keep_states(self) -> None:
        """Write the states that changed beside the jobs; all of them in the first pass."""
        if self._seq is None:
            self._seq = self._events.last_seq()
            changed = {run.id: run for run in self._runs.in_states(STATES)}
            self._unkept = dict.fromkeys(changed)
        else:
            events = self._events.since(self._seq)
            self._unkept |= {event.run_id: None for event in events if event.type == "state"}
            self._seq = events[-1].seq if events else self._seq
            changed = {run_id: run for run_id in self._unkept if (run := self._runs.find(run_id)) is not None}
        for run_id in [*self._unkept]:
            run = changed.get(run_id)
            if run is not None and run.origin == "service" and self._settings.has_made(run.folder):
                self._guarded(self._keep_state, run)
            else:
                del self._unkept[run_id]

    def _keep_state(self, run: Run) -> None:
        if run.state not in FINAL or run.folder.is_dir():  # what was deleted on purpose does not come back
            write_run_folder(run)
        write_state(self._settings, run)
        del self._unkept[run.id]  # not before: on a disk that is full it is written later

    def _look(self, run: Run) -> None:
        """Read a run's folder if anything changed in it since the last time."""
        printed = self._settings.jobs / run.id / str(run.attempt) / OUTPUT
        moved = last_change(run.folder, printed)
        key = (run.state, run.attempt, moved)
        if self._looked.get(run.id) == key or not moved:
            return
        seen_before = run.id not in self._looked and run.progress.get("moved") == moved  # by another process
        if seen_before and run.state in FINAL:
            self._looked[run.id] = key
            return
        # the lock of a folder that another machine has may not be seen here
        alive = run.state in _AT_WORK or RunFolder(run.folder).in_use()
        found = look(run.folder, run.progress, moved, alive)
        self._observations.keep(run.id, found.progress, found.seen)
        self._looked[run.id] = key

    def _search(self) -> None:
        """Find runs of the command line, and see how those are that were found before."""
        for folder in find_runs([Path(root) for root in self._settings.roots], self._settings.folder):
            run = self._runs.at_folder(folder)
            if run is None:
                run = self._add(folder)
        for run in self._runs.in_states(STATES, origin=COMMAND_LINE):
            self._guarded(self._follow, run)

    def _add(self, folder: Path) -> Run:
        run, created = RunFolder(folder), folder.stat().st_mtime
        config, (state, reason) = config_of(run), _parts(folder)
        return self._runs.add(
            NewRun(
                name=config.name if config is not None else folder.name, owner=owner_of(folder),
                config=config.resolved() if config is not None else {}, folder=folder, target={}, slots=0,
                origin=COMMAND_LINE, state=state, reason=reason, created=created, id=new_run_id(created),
            )
        )  # fmt: skip

    def _follow(self, run: Run) -> None:
        if not RunFolder(run.folder).config.exists():
            self._observations.forget(run.id)
            return
        state, reason = _parts(run.folder)
        self._observations.found(run.id, state, reason)
        self._look(run)


def _parts(folder: Path) -> tuple[RunState, str]:
    found = how_it_is(folder)
    return found.state, found.reason[:LONGEST_REASON]
