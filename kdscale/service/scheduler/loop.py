"""The scheduler: starts queued runs, watches jobs end and decides what follows.

A step may be killed between any two of its statements. Therefore what is about to be done is written down first (the
state `starting` before a job is submitted, `pausing` before it is stopped), every action may be repeated (an engine
starts a (run, attempt) once, however often it is asked), and a step looks only at the database and at the engines,
never at what an earlier step remembers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from kdscale.errors import ConfigError, KdscaleError, MachineError, RunFolderError
from kdscale.service.database.connection import Database
from kdscale.service.database.events import Events
from kdscale.service.database.folders import write_run_folder
from kdscale.service.database.runs import ClaimLimits, Run, Runs
from kdscale.service.engines.engine import Engine, EngineUnavailableError, Job, JobState
from kdscale.service.scheduler.leader import Leader
from kdscale.service.scheduler.machine import Machine, find_machine
from kdscale.service.scheduler.outcomes import Attempt, outcome
from kdscale.service.settings import ServiceSettings
from kdscale.service.states import ACTIVE, WrongTransitionError

LOCAL = "local"
LEADER_LOCK = "scheduler.lock"
_NO_LIMIT = 2**31 - 1
_TAIL_BYTES = 8000
_HUNG = "no progress since "
_log = logging.getLogger(__name__)


class Scheduler:
    """Brings the runs of a database forward with some engines. `clock` gives seconds since 1970."""

    def __init__(
        self,
        settings: ServiceSettings,
        database: Database,
        engines: Mapping[str, Engine],
        clock: Callable[[], float] = time.time,
        machine: Machine | None = None,
    ):
        self._settings, self._engines, self._clock = settings, engines, clock
        self._runs, self._events = Runs(database, clock), Events(database, clock)
        self.machine = machine if machine is not None else find_machine(settings)
        self._leader = Leader(settings.folder / LEADER_LOCK)
        self.on_step: Callable[[float], None] = lambda seconds: None  # called after each step, for whoever measures

    def run_forever(self, stop: threading.Event) -> None:
        """One step after another until `stop` is set; waits while another process schedules for the same home."""
        try:
            while not stop.is_set():
                try:
                    if self._leader.leads():
                        begun = time.monotonic()
                        self.step()
                        self.on_step(time.monotonic() - begun)
                except Exception:  # noqa: BLE001 (the queue must go on, whatever it was; the log has it)
                    # the database is locked for too long, the disk is full: what cannot be done now can be later
                    _log.exception("a step of the scheduler failed; it is tried again")
                stop.wait(self._settings.poll_seconds)
        finally:
            self._leader.resign()

    def leads(self) -> bool:
        """Whether this process is the one that schedules for the home folder."""
        return self._leader.leads()

    def step(self) -> None:
        """One pass: look at every active run, then start what fits. A run with a problem stops no other one."""
        for run in self._active():
            self._guarded(self._tend, run)
        for engine in self._runs.queued_for():
            while (claimed := self._runs.claim(self._limits(engine))) is not None:
                self._guarded(self._start, claimed)

    def _guarded(self, act: Callable[[Run], None], run: Run) -> None:
        try:
            act(run)
        except WrongTransitionError:
            pass  # somebody asked for something else since it was read: the next step acts on that
        except KdscaleError as error:
            # an engine that does not answer says nothing about the run
            self._say(run, f"cannot find out how it is: {error}")
        except Exception as error:  # noqa: BLE001 (of one run; the others go on, and the log has it)
            _log.exception("run %s", run.id)
            self._say(run, f"an error of the service (see its log): {type(error).__name__}: {error}")

    def _limits(self, engine: str) -> ClaimLimits:
        """What the next claim may take: of this machine what nobody holds, elsewhere what the settings allow."""
        settings = self._settings
        most = most_slots(settings, self.machine, engine)
        free = most - sum(run.slots for run in self._active() if engine_of(run) == engine)
        return ClaimLimits(
            max(0, free), settings.max_running, settings.default_quota, settings.quotas, engine, most, settings.runs
        )

    def _active(self) -> list[Run]:
        """The runs that hold slots, without those of another service that has the same database."""
        return [run for run in self._runs.in_states(ACTIVE) if self._settings.has_made(run.folder)]

    def _tend(self, run: Run) -> None:
        """Bring one active run forward."""
        if run.state in ("pausing", "cancelling"):
            self._stop(run)
        elif run.state == "starting" and run.handle is None:
            self._start(run)
        elif run.state == "recovering" and run.due is not None:
            if run.due <= self._clock():
                # the next attempt, in the database before it begins
                begun = {"attempt": run.attempt + 1, "tries": run.tries + 1, "handle": None}
                self._start(self._runs.move(run.id, "starting", expect={"recovering"}, reason=run.reason, **begun))
        else:
            self._look(run)

    def _start(self, run: Run) -> None:
        """Submit the attempt and see whether it runs."""
        submitted = self._submitted(run)
        if submitted is not None:
            self._look(submitted)

    def _submitted(self, run: Run) -> Run | None:
        """The run with the handle of its attempt, which may have been submitted before.

        One that cannot be started counts as one that ended: what follows is written down, and None comes back.
        """
        try:
            handle = self._engine(run).submit(self._job(run))
        except EngineUnavailableError:
            raise  # it says nothing about the attempt, which is submitted again by the next step
        except KdscaleError as error:
            # a disk that is full now says nothing about the run: it must not end all that wait
            code = MachineError.exit_code if isinstance(error, RunFolderError) else error.exit_code
            self._follow(run, JobState("ended", code), f"error: {error}")
            return None
        # also when somebody asked for a pause meanwhile: whoever stops it needs the handle
        updated = self._runs.update(run.id, expect=ACTIVE, handle=handle)
        return updated if updated is not None else self._runs.get(run.id)

    def _job(self, run: Run) -> Job:
        """The attempt as an engine takes it; its devices are in the database before anything runs on them."""
        devices = run.devices
        if engine_of(run) == LOCAL and not devices:
            held = {device for other in self._active() for device in other.devices}
            chosen = self.machine.choose(run.slots, held)
            if chosen is None:
                raise MachineError(f"run {run.id}", expected=f"{run.slots} free devices", got="fewer on this machine")
            if chosen:
                self._runs.update(run.id, expect=ACTIVE, devices=chosen)
            devices = chosen
        config = write_run_folder(run)
        return Job(
            run.id, run.attempt, run.folder, config, self._settings.jobs / run.id / str(run.attempt),
            run.slots, tuple(devices), run.target, run.name, run.owner,
        )  # fmt: skip

    def _look(self, run: Run) -> None:
        """See how the job of a run is that should be running, and write down what has changed."""
        assert run.handle is not None
        job = self._engine(run).state(run.handle)
        if job.phase in ("ended", "lost"):
            self._follow(run, job)
        elif job.phase == "waiting":
            if run.state == "running":  # its engine starts it again by itself
                self._runs.move(run.id, "recovering", expect={"running"}, reason=job.reason)
            else:
                self._say(run, job.reason)
        elif run.state != "running":
            self._runs.move(run.id, "running", expect={run.state}, reason=job.reason, started=self._clock())
        else:
            self._watch(run, job.reason)

    def _watch(self, run: Run, reason: str) -> None:
        """Say so when a running run makes no progress, and that it does again."""
        moved = max(float(run.progress.get("moved") or 0.0), run.started or 0.0)
        if self._clock() - moved > self._settings.hung_after:
            reason = _HUNG + datetime.fromtimestamp(moved, UTC).strftime("%Y-%m-%d %H:%M UTC")
            if run.reason != reason:
                self._events.append(run.id, "hung", {"since": moved})
        self._say(run, reason)

    def _stop(self, run: Run) -> None:
        """Tell the job of a run to stop, once, and see whether it has."""
        if run.handle is None:
            # it may have been submitted before the service was killed: asking again starts nothing twice
            submitted = self._submitted(run)
            if submitted is None:
                return
            run = submitted
        assert run.handle is not None
        engine = self._engine(run)
        job = engine.state(run.handle)
        if job.phase in ("ended", "lost"):
            self._follow(run, job)
        elif run.due is None:
            engine.cancel(run.handle, grace=self._settings.grace)
            self._runs.update(run.id, expect={run.state}, due=self._clock() + self._settings.grace)

    def _follow(self, run: Run, job: JobState, printed: str = "") -> None:
        """Write down what follows the end of an attempt."""
        if run.handle is not None and not printed:
            printed = self._engine(run).logs(run.handle, _TAIL_BYTES).decode("utf-8", "replace")
        seconds = self._clock() - run.started if run.started is not None and run.state == "running" else 0.0
        attempt = Attempt(run.state, run.tries, seconds, job, printed)
        decided = outcome(attempt, self._settings.tries, self._settings.retry_seconds)
        fields: dict[str, Any] = {"exit_code": job.exit_code}
        if decided.state == "recovering":
            fields |= {"due": self._clock() + decided.wait, "tries": decided.tries}
        if decided.state == run.state:  # its engine had begun to start it again, and has given up
            self._runs.update(run.id, expect={run.state}, reason=decided.reason, **fields)
        else:
            self._runs.move(run.id, decided.state, expect={run.state}, reason=decided.reason, **fields)

    def _say(self, run: Run, reason: str) -> None:
        """Give a reason for the state that a run is in, if it is another than before."""
        if reason != run.reason:
            self._runs.update(run.id, expect={run.state}, reason=reason[:4000])

    def _engine(self, run: Run) -> Engine:
        """The run's engine. Raises ConfigError when there is none of that name."""
        name = engine_of(run)
        if name not in self._engines:
            raise ConfigError("target.engine", expected=f"one of {', '.join(self._engines)}", got=repr(name))
        return self._engines[name]


def most_slots(settings: ServiceSettings, machine: Machine, engine: str) -> int:
    """How many slots an engine has in all: those of this machine, or what the settings allow elsewhere."""
    if engine == LOCAL:
        return machine.slots
    allowed = settings.engines.get(engine, {}).get("slots")  # None may be written there, too
    return _NO_LIMIT if allowed is None else int(allowed)


def engine_of(run: Run) -> str:
    """The name of the engine that a run asks for."""
    return str(run.target.get("engine") or LOCAL)
