"""What of ended runs is deleted, and when: a row of RULES for each kind of thing, and the trash after them.

Only in run folders that this service made. Everything goes to the trash first, by one rename, and is written down
before: as an event of the run and a line of the audit log. A student goes only when the settings say so, its owner was
told, and `notice_days` have passed since the notice arrived.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kdscale.errors import KdscaleError, RunFolderError
from kdscale.files import remove_tree
from kdscale.runs.folder import QUANTIZED, STUDENT, RunFolder
from kdscale.service.database.accounts import Accounts
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.runs import Run, Runs
from kdscale.service.engines.supervisor import OUTPUT
from kdscale.service.notices.occasions import Notice
from kdscale.service.notices.sender import Notices
from kdscale.service.operations.trash import in_trash, move_to_trash, place_in_trash
from kdscale.service.settings import RetentionSettings, ServiceSettings
from kdscale.service.states import FINAL, STATES, RunState

ACTOR = "retention"  # in the audit log
DAY = 86_400.0
_TOPIC = "removal of the student"
_SECONDS_BETWEEN = 3600.0
_ANSWERED_DAYS = 30.0  # for which notices that are done stay in the database, at least
_log = logging.getLogger("kdscale.service.retention")

Kind = Literal["checkpoints", "logs", "students", "trash"]


@dataclass(frozen=True)
class Rule:
    """After how many days something of runs in some states goes; `find` gives the paths of a run."""

    after: Callable[[RetentionSettings], float | None]
    states: frozenset[RunState]
    find: Callable[[ServiceSettings, Run], list[Path]]
    told_first: bool = False


def _checkpoints(settings: ServiceSettings, run: Run) -> list[Path]:
    folders = [RunFolder(run.folder), *(RunFolder(path) for path in sorted((run.folder / "steps").glob("*")))]
    return [folder.checkpoints for folder in folders]


def _logs(settings: ServiceSettings, run: Run) -> list[Path]:
    # only what was printed: by the other files a lost database is made anew, and no attempt is started twice
    return sorted((settings.jobs / run.id).glob(f"*/{OUTPUT}"))


def _students(settings: ServiceSettings, run: Run) -> list[Path]:
    folder = RunFolder(run.folder)
    return [folder.at(STUDENT), folder.at(QUANTIZED)]


RULES: Mapping[Kind, Rule] = {
    # those of a run that failed or was cancelled are what it goes on from
    "checkpoints": Rule(lambda settings: settings.checkpoints_after, frozenset({"succeeded"}), _checkpoints),
    "logs": Rule(lambda settings: settings.logs_after, FINAL, _logs),
    "students": Rule(lambda settings: settings.students_after, frozenset({"succeeded"}), _students, told_first=True),
}


@dataclass(frozen=True)
class Removal:
    """Something that is deleted at `due`, in seconds since 1970; `kept` says why it is not, although it is time."""

    kind: Kind
    run_id: str
    path: Path
    size: int
    due: float
    kept: str = ""
    name: str = ""  # for people


class Retention:
    """Deletes what the settings say. `clock` gives seconds since 1970."""

    def __init__(
        self, settings: ServiceSettings, database: Database, notices: Notices, clock: Callable[[], float] = time.time
    ):
        self._settings, self._database, self._notices, self._clock = settings, database, notices, clock
        self._runs, self._events = Runs(database, clock), Events(database, clock)
        self._accounts = Accounts(database, clock)

    def run_forever(self, stop: threading.Event, leads: Callable[[], bool]) -> None:
        """One pass an hour until `stop` is set, while this process is the one that schedules."""
        while not stop.is_set():
            try:
                if leads():
                    self.step()
            except Exception:  # noqa: BLE001 (it is tried again in an hour, and the log has it)
                _log.exception("a pass of the retention failed; it is tried again")
            stop.wait(_SECONDS_BETWEEN)

    def plan(self) -> list[Removal]:
        """Everything that is deleted some day, the soonest first; changes nothing."""
        found = [*self._of_runs(), *self._of_trash()]
        return sorted(found, key=lambda item: (item.due, str(item.path)))

    def step(self) -> list[Removal]:
        """Tell owners what will go, and delete what is due; returns what was deleted."""
        self._tell_owners()
        now, gone = self._clock(), []
        for removal in self.plan():
            if removal.due > now or removal.kept:
                continue
            try:
                self._empty(removal) if removal.kind == "trash" else self._discard(removal)
            except (KdscaleError, OSError) as error:
                _log.warning("%s of run %s cannot be deleted: %s", removal.kind, removal.run_id, error)
            else:
                gone.append(removal)
        # not before what was told has its consequences: it would be told anew, and so for ever
        kept_days = _ANSWERED_DAYS + self._settings.retention.notice_days
        self._notices.outbox.forget(now - kept_days * DAY)
        return gone

    def _of_runs(self) -> Iterator[Removal]:
        for kind, rule in RULES.items():
            days = rule.after(self._settings.retention)
            if days is None:
                continue
            configs = self._configs_of_what_goes_on() if rule.told_first else {}
            for run in self._runs.in_states(rule.states):
                if run.ended is None or not _is_own(self._settings, run):
                    continue
                due, kept = run.ended + days * DAY, ""
                if rule.told_first:
                    due, kept = self._after_notice(run, due)
                    if reader := next((other for other, config in configs.items() if run.id in config), None):
                        kept = f"run {reader}, which has not ended, reads from it"
                for path in rule.find(self._settings, run):
                    if os.path.lexists(path):
                        yield Removal(kind, run.id, path, size_of(path), due, kept, path.name)

    def _configs_of_what_goes_on(self) -> dict[str, str]:
        """The configs of all runs that have not ended, which may name the student of another one."""
        return {run.id: json.dumps(run.config) for run in self._runs.in_states({*STATES} - FINAL, origin=None)}

    def _of_trash(self) -> Iterator[Removal]:
        for item in in_trash(self._settings):
            due = item.since + self._settings.retention.trash_after * DAY
            yield Removal("trash", item.run_id, item.path, size_of(item.path), due, name=item.what)

    def _after_notice(self, run: Run, due: float) -> tuple[float, str]:
        """When a student may go, and why it may not."""
        told = self._notices.outbox.told(run.id, _TOPIC)
        if told is not None:
            return max(due, told + self._settings.retention.notice_days * DAY), ""
        with self._database.read() as connection:
            someone = self._notices.recipients(connection, self._notice(run, due))
        if not someone:
            return due, f"{run.owner} has no address in notices.owners, so nobody can be told"
        return due, "" if due > self._clock() else f"{run.owner} was not told yet"

    def _tell_owners(self) -> None:
        """Write the notices of students that go soon, once each."""
        days, rule = self._settings.retention.students_after, RULES["students"]
        if days is None:
            return
        for run in self._runs.in_states(rule.states):
            due = (run.ended or 0.0) + days * DAY
            soon = due - self._settings.retention.notice_days * DAY <= self._clock()
            there = any(os.path.lexists(path) for path in rule.find(self._settings, run))
            if run.ended is not None and soon and there and _is_own(self._settings, run):
                with self._database.begin() as connection:
                    self._notices.add(connection, self._notice(run, due))

    def _notice(self, run: Run, due: float) -> Notice:
        earliest = max(due, self._clock() + self._settings.retention.notice_days * DAY)
        when = datetime.fromtimestamp(earliest, UTC).isoformat(timespec="minutes")
        paths = [path.name + "/" for path in _students(self._settings, run) if os.path.lexists(path)]
        facts = {"paths": paths, "deleted_at": when, "reason": "retention.students_after of this service"}
        return Notice(_TOPIC, "removal", run, self._clock(), facts)

    def _discard(self, removal: Removal) -> None:
        """Move something of a run to the trash, while no process holds the run."""
        what = removal.path.name.replace(".", "_")
        with RunFolder(self._runs.get(removal.run_id).folder).lock():
            # a run that was started anew meanwhile needs it
            if self._runs.get(removal.run_id).state not in RULES[removal.kind].states:
                raise RunFolderError(f"run {removal.run_id} goes on", hint="nothing of it is deleted")
            place = place_in_trash(self._settings, removal.run_id, what, self._clock())
            self._write_down("removed", removal, {"trash": place.name})
            move_to_trash(self._settings, removal.path, place)

    def _empty(self, removal: Removal) -> None:
        self._write_down("trash_emptied", removal, {})
        remove_tree(removal.path)

    def _write_down(self, event: str, removal: Removal, more: Mapping[str, str]) -> None:
        path = removal.path.relative_to(self._settings.folder).as_posix()
        facts = {"kind": removal.kind, "path": path, "bytes": removal.size, **more}
        self._events.append(removal.run_id, event, facts)
        self._accounts.audit(ACTOR, f"{event}: {removal.kind}", removal.run_id, facts)
        _log.info("%s: %s of run %s (%d bytes)", event, path, removal.run_id, removal.size)


def _is_own(settings: ServiceSettings, run: Run) -> bool:
    """Whether the service made this run folder: nothing in anybody else's is ever deleted."""
    return run.origin == "service" and run.folder == settings.runs / run.id and not run.folder.is_symlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; links count as nothing and are not followed."""
    total, waiting = 0, [path]
    while waiting:
        item = waiting.pop()
        try:
            info = item.lstat()
            if stat.S_ISDIR(info.st_mode):
                waiting += item.iterdir()
            elif stat.S_ISREG(info.st_mode):
                total += info.st_size
        except OSError:  # gone by now
            continue
    return total
