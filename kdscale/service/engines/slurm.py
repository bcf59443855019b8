"""Runs on a Slurm cluster: sbatch, squeue, sacct and scancel.

squeue knows a job from the moment it is accepted until some minutes after its end; sacct knows it for good, but later,
and not on every cluster. The script leaves its exit code in the attempt's notes besides.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Literal

from kdscale.errors import LackOfMemoryError
from kdscale.files import write_text
from kdscale.jobs.launch import launcher_errors
from kdscale.runtime.exits import FINAL_CODES
from kdscale.service.engines.cluster import (
    CANCELLED,
    LOST,
    Attempt,
    ClusterEngine,
    Sighting,
    job_name,
    people_labels,
)
from kdscale.service.engines.engine import Job
from kdscale.service.engines.programs import Answer, ask, failure
from kdscale.service.engines.ranks import rank_request, rank_variables, submitter_variables, working_folder
from kdscale.service.engines.targets import SlurmTarget
from kdscale_launch.job import STOPPED_EXIT_CODE
from kdscale_launch.processes import tail
from kdscale_launch.systems import slurm

_DAY = 86_400.0
_SCRIPT = "job.sbatch"
# Job states: slurm.schedmd.com/job_state_codes.html. The flags among them say what a job is on its way to.
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_RUNNING = {
    "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "POWER_UP_NODE",
    "UPDATE_DB", "EXPEDITING",
}  # fmt: skip
# The exit code that a state stands for where the script left none: it may go on, unless it lacked memory.
_ENDED = {
    "COMPLETED": 0, "CANCELLED": CANCELLED, "TIMEOUT": LOST, "DEADLINE": LOST, "PREEMPTED": LOST, "NODE_FAIL": LOST,
    "BOOT_FAIL": LOST, "LAUNCH_FAILED": LOST, "RECONFIG_FAIL": LOST, "REVOKED": LOST,
    "OUT_OF_MEMORY": LackOfMemoryError.exit_code,
}  # fmt: skip
_REASONS = {
    "TIMEOUT": "the time limit was reached", "DEADLINE": "the deadline was reached", "PREEMPTED": "preempted",
    "NODE_FAIL": "a node failed", "BOOT_FAIL": "a node did not boot", "OUT_OF_MEMORY": "out of memory",
    "CANCELLED": "cancelled in Slurm",
}  # fmt: skip
_PASSING = re.compile(
    r"unable to contact slurm controller|socket timed out|connection refused|temporarily unable|zero bytes were"
    r"|resource temporarily unavailable|unable to connect|communication (connection )?failure|try again"
    r"|slurm_persist_conn|maxsubmitjob|job violates accounting/qos policy .*submit",
    re.IGNORECASE,
)
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled", re.IGNORECASE)
_ALREADY_OVER = re.compile(r"already completing or completed|invalid job id|job is pending|not found", re.IGNORECASE)


class SlurmEngine(ClusterEngine):
    """Batch jobs. Slurm itself requeues a job that it preempts, and one that saved before its time limit."""

    name = "slurm"
    title = "Slurm"

    def prepare(self, job: Job, attempt: Attempt, target: SlurmTarget) -> Path:
        """Write the batch script. Raises ConfigError for options that sbatch would not take."""
        slots = target.slots_per_node
        request = rank_request(job, target.nodes * slots)
        given = {"partition": target.partition, "account": target.account, "gpus-per-node": target.gpus_per_node or ""}
        about = {"comment": "; ".join([job_name(job), *people_labels(job).values()])}
        options = [f"{name}={value}" for name, value in {**given, **about}.items() if value]
        collective = request.preflight_command(self.settings.python, "collective", "120")
        with launcher_errors("target"):
            script = slurm.render(
                slurm.SlurmJob(
                    name=job_name(job), nodes=target.nodes, slots=slots, notes=str(attempt.notes.absolute()),
                    command=request.rank_command(self.settings.python), cwd=working_folder(self.settings),
                    output=slurm.file_pattern(str(job.work.absolute())) + "/slurm-%j.out",
                    check=collective if self.settings.check else (), env=rank_variables(self.settings),
                    time_limit=target.time, warn_seconds=self.settings.warn, final_codes=FINAL_CODES,
                    max_restarts=0,  # of what broke: the service counts its tries
                    directives=(*options, *target.extra),
                )
            )  # fmt: skip
        attempt.notes.mkdir(parents=True, exist_ok=True)
        write_text(job.work / _SCRIPT, script)
        return job.work / _SCRIPT

    def start(self, attempt: Attempt, prepared: Path) -> str:
        """Submit the script; returns the job's number."""
        variables = submitter_variables(self.settings, os.environ)
        answer = ask(["sbatch", "--parsable", str(prepared)], seconds=self.settings.command_seconds, env=variables)
        number = answer.output.strip().partition(";")[0]
        if answer.code or not number.isdigit():
            raise failure(answer, _PASSING)
        return number

    def find(self, attempt: Attempt, asked_before: bool) -> str | None:
        """Look for the job by its name; one that was asked for before may have ended since."""
        rows = self._queue(attempt) or (self._accounts(attempt) if asked_before else [])
        return max((row[0] for row in rows), key=int, default=None)

    def look(self, attempt: Attempt) -> Sighting:
        """What squeue says, and once the job has ended what sacct says."""
        queued = _newest(self._queue(attempt), attempt.number)
        if queued is not None:
            if queued[1] in _WAITING:
                return Sighting("waiting", reason="" if queued[2] == "None" else queued[2])
            if queued[1] in _RUNNING:
                return Sighting("running", reason="" if queued[1] == "RUNNING" else queued[1].lower())
        own = attempt.exit_code()
        if queued is not None and own is not None:
            return _ended(queued[1], own, None)
        kept = _newest(self._accounts(attempt), attempt.number)
        if kept is not None and kept[1] not in _WAITING | _RUNNING:
            return _ended(kept[1], own, _exit_code(kept[2]))
        if queued is not None and queued[1] != "FAILED":
            return _ended(queued[1], own, None)
        # sacct lags behind: until it knows the exit code, or the script's own appears, the end is not known
        return Sighting("gone")

    def _queue(self, attempt: Attempt) -> list[tuple[str, str, str]]:
        """Number, state and reason of each job of the attempt's name that slurmctld knows."""
        answer = self._ask("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--name={attempt.name}",
                           "--format=%i|%T|%r")  # fmt: skip
        if answer.code:
            raise failure(answer, re.compile(""))  # whatever it says: nothing is known now
        return _rows(answer)

    def _accounts(self, attempt: Attempt) -> list[tuple[str, str, str]]:
        """Number, state and exit code of each job of the attempt's name that slurmdbd knows; none without one."""
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(attempt.facts.get("asked", 0.0) - _DAY))
        answer = self._ask("sacct", "--noheader", "--parsable2", "--allocations", f"--user={os.getuid()}",
                           f"--name={attempt.name}", f"--starttime={since}",
                           "--format=JobIDRaw,State,ExitCode")  # fmt: skip
        if answer.code and _NO_ACCOUNTING.search(answer.said):
            return []
        if answer.code:
            raise failure(answer, re.compile(""))
        return _rows(answer)

    def tell(self, attempt: Attempt) -> None:
        """SIGTERM to the script, which passes it on to every rank and waits for them."""
        self._cancel("--state=RUNNING", "--batch", "--signal=TERM", attempt.number)

    def kill(self, attempt: Attempt, phase: Literal["waiting", "running"]) -> None:
        """Take back what is pending; only what was running is killed while it runs."""
        self._cancel(*(["--state=PENDING"] if phase == "waiting" else []), attempt.number)

    def _cancel(self, *arguments: str) -> None:
        answer = self._ask("scancel", *arguments)
        if answer.code and not _ALREADY_OVER.search(answer.said):
            raise failure(answer, re.compile(""))

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """See Engine: the file that Slurm writes, which every start of the job adds to."""
        attempt = Attempt(Path(handle))
        return tail(attempt.work / f"slurm-{attempt.number}.out", tail_bytes).encode() if attempt.number else b""

    def _ask(self, *command: str) -> Answer:
        return ask(command, seconds=self.settings.command_seconds)


def _rows(answer: Answer) -> list[tuple[str, str, str]]:
    """Lines of three columns that begin with a job's number."""
    columns = [line.strip().split("|", 2) for line in answer.output.splitlines()]
    return [(row[0], row[1], row[2]) for row in columns if len(row) == 3 and row[0].isdigit()]


def _newest(rows: list[tuple[str, str, str]], number: str) -> tuple[str, str, str] | None:
    """The row of this job; sacct has `CANCELLED by 1000` for a state."""
    own = [row for row in rows if number in ("", row[0])]
    if not own:
        return None
    job, state, rest = max(own, key=lambda row: int(row[0]))
    return job, (state.split() or [""])[0].rstrip("+"), rest


def _exit_code(text: str) -> int | None:
    """`75:0` is exit code 75, `0:9` the end by signal 9."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if match is None:
        return None
    return 128 + int(match[2]) if int(match[2]) else int(match[1])


def _ended(state: str, own: int | None, accounted: int | None) -> Sighting:
    """The end of a job in `state`: what saved before it was ended has saved, whatever Slurm calls it."""
    if state == "FAILED":
        return Sighting("ended", accounted if own is None else own)
    code = own if own == STOPPED_EXIT_CODE else _ENDED.get(state, LOST)
    return Sighting("ended", code, _REASONS.get(state, "" if state in _ENDED else state.lower()))
