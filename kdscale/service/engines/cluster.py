"""What the engines of job systems share: one job for each attempt, asked about until its end is known.

An attempt's folder is all that an engine knows. WORK/job.json says what was asked of the system and what is known of
the job; WORK/notes is what the job and the service tell each other (kdscale_launch.systems.notes), so the folder must
be on storage that the machines of the job share with the service.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from kdscale.errors import ConfigError, KdscaleError, LostRankError
from kdscale.files import explain_os_errors, read_own_json, write_json
from kdscale.runtime.exits import FINAL_CODES
from kdscale.service.engines.engine import EngineUnavailableError, Job, JobState
from kdscale.service.engines.programs import EngineSilentError
from kdscale.service.engines.targets import read_settings, read_target
from kdscale_launch.environment import check_text
from kdscale_launch.job import STOPPED_EXIT_CODE, LaunchError
from kdscale_launch.systems import notes

LOST = LostRankError.exit_code  # for what was cut off without an error of its own
KILLED, CANCELLED = 137, 143  # by the service when its time was up; by somebody else, in the system itself
_PART = re.compile(r"[a-z0-9]([a-z0-9-]{0,25}[a-z0-9])?")
_LONGEST_LABEL = 100
_SILENT_SECONDS = 120.0  # for which a system that did not answer is not asked
_AGAIN_SECONDS = 30.0  # after which a job that is still there is ended once more


@dataclass(frozen=True)
class Sighting:
    """What the system says of a job; `gone`: it knows none."""

    phase: Literal["waiting", "running", "ended", "gone"]
    exit_code: int | None = None
    reason: str = ""


class Attempt:
    """One attempt's folder: what is known of its job."""

    def __init__(self, work: Path):
        self.work, self.notes = work, work / "notes"
        self._file = work / "job.json"
        self.facts: dict[str, Any] = read_own_json(self._file, lambda value: isinstance(value, dict)) or {}

    def learn(self, **facts: Any) -> None:
        """Write down what is new."""
        if any(self.facts.get(name) != value for name, value in facts.items()):
            self.facts |= facts
            write_json(self._file, self.facts)

    @property
    def name(self) -> str:
        """The job's name in the system: it holds the run and the attempt, and no other job has it."""
        return str(self.facts.get("name", ""))

    @property
    def number(self) -> str:
        """The system's own number of the job; empty where it has none, or none is known."""
        return str(self.facts.get("number", ""))

    def exit_code(self) -> int | None:
        """The code that the job itself left."""
        return notes.job_exit_code(notes.read_exit_codes(self.notes), FINAL_CODES)


class ClusterEngine(ABC):
    """The five calls, made of what each system does in its own way. A handle is the path of the attempt's folder."""

    name: ClassVar[str]

    def __init__(self, settings: Any = None, clock: Callable[[], float] = time.time):
        self.settings = read_settings(self.name, getattr(settings, "engines", None) or {})
        self.clock = clock
        self._lately: dict[str, tuple[float, JobState]] = {}  # answers that are not asked for again yet
        self._silent: tuple[float, str] | None = None  # when the system did not answer in time, and what it did not

    def submit(self, job: Job) -> str:
        """See Engine. Raises ConfigError for a target or a config that the system does not take."""
        with explain_os_errors(job.work):
            job.work.mkdir(parents=True, exist_ok=True)
        attempt = Attempt(job.work)
        if attempt.facts.get("submitted") or attempt.facts.get("lost"):  # what is lost stays so: the next one follows
            return str(job.work)
        target = read_target({"engine": self.name, **(job.target or {})}, self.settings)
        prepared = self.prepare(job, attempt, target)
        asked_before = "asked" in attempt.facts
        attempt.learn(name=job_name(job), asked=attempt.facts.get("asked", self.clock()))
        with self._patience():
            number = self.find(attempt, asked_before)
            if number is None:
                number = self._start(attempt, prepared)
        attempt.learn(number=number, submitted=True)
        return str(job.work)

    def _start(self, attempt: Attempt, prepared: Any) -> str:
        """Hand the job over, once: where nobody knows whether it was taken, it is lost rather than started twice."""
        if attempt.facts.get("handing_over") and not self.one_by_name:
            return ""
        attempt.learn(handing_over=True)
        try:
            return self.start(attempt, prepared)
        except EngineSilentError:
            raise
        except KdscaleError:
            attempt.learn(handing_over=False)
            raise

    def state(self, handle: str) -> JobState:
        """See Engine. Also carries out what was asked of a job that could not be reached then."""
        asked, seen = self._lately.get(handle, (0.0, None))
        if seen is None or not 0.0 <= self.clock() - asked < self.settings.poll_seconds:
            with self._patience():
                seen = self._state(handle)
            self._lately[handle] = (self.clock(), seen)
        return seen

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A block that asks the system. One that did not answer is left alone for a while: others wait for each call.

        Raises EngineUnavailableError in that while.
        """
        if self._silent is not None and 0.0 <= self.clock() - self._silent[0] < _SILENT_SECONDS:
            raise EngineUnavailableError(f"{self.title} did not answer lately", got=self._silent[1])
        self._silent = None
        try:
            yield
        except EngineSilentError as error:
            self._silent = self.clock(), error.what
            raise

    def _state(self, handle: str) -> JobState:
        """See `state`: asked of the system."""
        attempt = Attempt(Path(handle))
        if (end := attempt.facts.get("end")) is not None:
            return JobState("ended", end["exit_code"], end["reason"])
        if attempt.facts.get("lost") or not attempt.work.is_dir():
            return JobState("lost", reason=attempt.facts.get("lost") or f"{attempt.work} is gone")
        seen = self.look(attempt) if attempt.name else Sighting("gone")
        if seen.phase == "gone":
            return self._missing(attempt)
        attempt.learn(missed=None)
        if seen.phase == "ended":
            return self._ended(attempt, seen.exit_code, seen.reason)
        if seen.phase == "running":
            attempt.learn(began=True)
        self._stop(attempt, seen.phase)
        reason = seen.reason
        if seen.phase == "waiting" and attempt.facts.get("began"):
            reason = f"preempted or restarted: {reason or 'goes on when there is room'}"
        return JobState(seen.phase, reason=reason)

    def _missing(self, attempt: Attempt) -> JobState:
        """Of a job that the system does not know (any more, or yet)."""
        if (code := attempt.exit_code()) is not None:
            return self._ended(attempt, code, "")
        if attempt.facts.get("killed"):
            return self._ended(attempt, None, "cancelled")
        since = attempt.facts.get("missed")
        attempt.learn(missed=self.clock() if since is None else since)
        if since is not None and self.clock() - since >= self.settings.patience:
            # the next attempt must not meet it: should it turn up again, it leaves
            notes.ask_to_stop(attempt.notes)
            attempt.learn(lost=f"{self.title} does not know the job, and it left no exit code")
            return JobState("lost", reason=attempt.facts["lost"])
        phase: Literal["waiting", "running"] = "running" if attempt.facts.get("began") else "waiting"
        return JobState(phase, reason=f"{self.title} does not show the job")

    def _ended(self, attempt: Attempt, code: int | None, reason: str) -> JobState:
        """Remember the end: systems forget it after a while."""
        if code in (None, CANCELLED) and (killed := attempt.facts.get("killed")):
            # what had not begun, or was saved before it had to wait again, has nothing to lose
            code = STOPPED_EXIT_CODE if killed == "waiting" else KILLED
        code = LOST if code is None else code
        attempt.learn(end={"exit_code": code, "reason": reason})
        return JobState("ended", code, reason)

    def _stop(self, attempt: Attempt, phase: Literal["waiting", "running"]) -> None:
        """Tell a job that is to stop, once, and end it when its time is up. One that waits has nothing to save."""
        if (deadline := attempt.facts.get("stop_by")) is None:
            return
        now = self.clock()
        if phase == "running" and now < deadline:
            attempt.learn(killed=None)  # it began before it could be taken back
            if not attempt.facts.get("told"):
                self.tell(attempt)
                attempt.learn(told=True)
        elif attempt.facts.get("killed") != phase or now - attempt.facts.get("killed_at", 0.0) >= _AGAIN_SECONDS:
            attempt.learn(killed=phase)
            self.kill(attempt, phase)
            attempt.learn(killed_at=now)

    def cancel(self, handle: str, *, grace: float) -> None:
        """See Engine. A job that cannot be reached now is told by the next call of `state`."""
        attempt = Attempt(Path(handle))
        if "end" in attempt.facts or not attempt.facts.get("asked"):
            return
        deadline = self.clock() + grace
        attempt.learn(stop_by=min(deadline, attempt.facts.get("stop_by", deadline)))
        with explain_os_errors(attempt.notes):
            notes.ask_to_stop(attempt.notes)
        self._lately.pop(handle, None)
        self.state(handle)

    def requeue(self, handle: str, job: Job) -> str:
        """See Engine."""
        if self.state(handle).phase not in ("ended", "lost"):
            self.cancel(handle, grace=0.0)
        return self.submit(job)

    title: ClassVar[str]
    one_by_name: ClassVar[bool] = False  # the system itself takes no second job of a name

    @abstractmethod
    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """See Engine."""

    @abstractmethod
    def prepare(self, job: Job, attempt: Attempt, target: Any) -> Any:
        """What `start` hands over. Raises ConfigError for what the system would refuse."""

    @abstractmethod
    def find(self, attempt: Attempt, asked_before: bool) -> str | None:
        """The number of the attempt's job, or None where the system knows none."""

    @abstractmethod
    def start(self, attempt: Attempt, prepared: Any) -> str:
        """Hand the job over; returns its number, if it has one."""

    @abstractmethod
    def look(self, attempt: Attempt) -> Sighting:
        """Ask the system for the job."""

    @abstractmethod
    def kill(self, attempt: Attempt, phase: Literal["waiting", "running"]) -> None:
        """End the job. One that was `waiting` when it was seen may run by now, and then this may leave it alone."""

    def tell(self, attempt: Attempt) -> None:  # noqa: B027 - for most systems the note is enough
        """Send the job SIGTERM, where the note that asks it to stop does not do."""


def job_name(job: Job) -> str:
    """`kdscale-RUN-ATTEMPT`, which every system takes. Raises ConfigError for an id that does not fit in."""
    if not _PART.fullmatch(job.run_id) or not 0 <= job.attempt < 10_000:
        raise ConfigError(
            "the id of a run", expected="lower-case letters, digits and dashes", got=f"{job.run_id!r}, {job.attempt}"
        )
    return f"kdscale-{job.run_id}-{job.attempt}"


def labels(job: Job) -> dict[str, str]:
    """What finds the objects of an attempt, and nothing else's."""
    return {"kdscale-run": job.run_id, "kdscale-attempt": str(job.attempt)}


def people_labels(job: Job) -> dict[str, str]:
    """The name and the owner of a run, for people who look at the system; what cannot be shown is left out."""
    shown: dict[str, str] = {}
    for key, text in (("kdscale-name", job.name), ("kdscale-owner", job.owner)):
        try:
            check_text(key, text)
        except LaunchError:
            continue
        if text:
            shown[key] = text[:_LONGEST_LABEL]
    return shown
