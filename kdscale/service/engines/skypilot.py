"""Runs on machines that SkyPilot finds: a managed job for each attempt.

SkyPilot brings a job back by itself when it loses the machines. Cancelling takes machines away without a signal to the
ranks, so a run is asked to save through its notes, and cancelled when its time is up.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from kdscale.errors import ConfigError, FileError, MachineError
from kdscale.files import parse_json, write_text
from kdscale.jobs.launch import launcher_errors
from kdscale.service.engines.cluster import CANCELLED, LOST, Attempt, ClusterEngine, Sighting, job_name
from kdscale.service.engines.engine import EngineUnavailableError, Job
from kdscale.service.engines.programs import Answer, ask, failure, tail_of
from kdscale.service.engines.ranks import rank_request, rank_variables, working_folder
from kdscale.service.engines.targets import SkyPilotTarget
from kdscale_launch.systems import skypilot as sky

_TASK = "task.yaml"
# ManagedJobStatus of SkyPilot 0.14.
_WAITING = {"PENDING", "SUBMITTED", "STARTING", "RECOVERING"}
_RUNNING = {"RUNNING", "WINDING_DOWN"}
_CODES = {
    "SUCCEEDED": 0,
    "FAILED": 1,
    "FAILED_SETUP": ConfigError.exit_code,
    "FAILED_PRECHECKS": ConfigError.exit_code,
    "FAILED_NO_RESOURCE": MachineError.exit_code,
    "FAILED_CONTROLLER": LOST,
    "CANCELLED": CANCELLED,
}
_EXIT = re.compile(r"exit codes? \[?((?:\d{1,3}(?:, )?)+)")  # "exited with exit code 6", "... exit codes [0, 6]"
_PASSING = re.compile(
    r"api server|connect|time[d ]?out|unavailable|try again|temporar|max retries|connection|5\d\d server error",
    re.IGNORECASE,
)


class SkyPilotEngine(ClusterEngine):
    """Managed jobs, found by their name: the controller gives a number only some time after it took the job."""

    name = "skypilot"
    title = "SkyPilot"
    _known: tuple[float, list[dict[str, Any]]] | None = None  # all jobs, and when: one slow call tells of all runs

    def prepare(self, job: Job, attempt: Attempt, target: SkyPilotTarget) -> Path:
        """Write the task's file. Raises ConfigError for what SkyPilot would refuse or change."""
        slots = target.slots_per_node
        request = rank_request(job, target.nodes * slots)
        with launcher_errors("target"):
            task = sky.task(
                sky.SkyPilotTask(
                    name=job_name(job), nodes=target.nodes, slots=slots,
                    command=request.rank_command(self.settings.python), log_dir=str(request.logs / "ranks"),
                    cwd=working_folder(self.settings), notes=str(attempt.notes.absolute()),
                    python=self.settings.python, infra=target.infra, accelerators=target.accelerators,
                    image=target.image, cpus=target.cpus, memory=target.memory, spot=target.spot,
                    disk_gigabytes=target.disk_gigabytes, setup=target.setup, env=rank_variables(self.settings),
                    volumes=target.volumes, buckets=target.buckets, secrets=target.secrets, grace=self.settings.grace,
                )
            )  # fmt: skip
        if missing := [name for name in target.secrets if name not in os.environ]:
            raise ConfigError("target.secrets", expected="variables of the service's environment", got=missing[0])
        attempt.learn(secrets=list(target.secrets))
        write_text(job.work / _TASK, json.dumps(task, indent=2, ensure_ascii=False) + "\n")  # JSON is YAML too
        return job.work / _TASK

    def find(self, attempt: Attempt, asked_before: bool) -> str | None:
        """The number of the job of the attempt's name."""
        self._known = None
        found = self._record(attempt)
        return None if found is None else str(found.get("job_id", ""))

    def start(self, attempt: Attempt, prepared: Path) -> str:
        """Hand the task to SkyPilot's server, which goes on by itself; the job's number comes later."""
        self._known = None
        secrets = [part for name in attempt.facts["secrets"] for part in ("--secret", name)]
        answer = self._sky("jobs", "launch", "--yes", "--async", "--name", attempt.name, *secrets, str(prepared))
        if answer.code:
            raise failure(answer, _PASSING)
        return ""

    def look(self, attempt: Attempt) -> Sighting:
        """What the queue of managed jobs says."""
        found = self._record(attempt)
        if found is None:
            return Sighting("gone")
        attempt.learn(number=str(found.get("job_id", "")))
        status, said = str(found.get("status")), str(found.get("failure_reason") or "")[:500]
        if status in _WAITING:
            lost = (
                f"the machines were lost ({found.get('recovery_count') or 0} times before); SkyPilot looks for others"
            )
            return Sighting("waiting", reason=lost if status == "RECOVERING" else status.lower())
        if status in _RUNNING:
            return Sighting("running")
        if status == "CANCELLING":
            return Sighting("waiting" if attempt.facts.get("killed") == "waiting" else "running", reason="cancelling")
        if status not in _CODES:
            raise EngineUnavailableError("sky jobs queue", expected="a status of SkyPilot 0.14", got=repr(status)[:100])
        own = attempt.exit_code()
        if status in ("SUCCEEDED", "FAILED"):
            return Sighting("ended", _told(said, _CODES[status]) if own is None else own, said)
        return Sighting("ended", _CODES[status], said or status.lower().replace("_", " "))

    def kill(self, attempt: Attempt, phase: Literal["waiting", "running"]) -> None:
        """Cancel the job by its name, which no other job has."""
        self._known = None
        answer = self._sky("jobs", "cancel", "--yes", "--name", attempt.name)
        if answer.code and "not found" not in answer.said.lower():
            raise failure(answer, re.compile(""))

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """See Engine."""
        attempt = Attempt(Path(handle))
        if not attempt.number:
            return b""
        command = ["sky", "jobs", "logs", "--no-follow", attempt.number]
        return tail_of(command, seconds=self.settings.command_seconds, limit=tail_bytes)

    def _record(self, attempt: Attempt) -> dict[str, Any] | None:
        """The newest managed job of the attempt's name."""
        records = [item for item in self._queue() if item.get("job_name") == attempt.name]
        return max(records, key=lambda item: int(item.get("job_id") or 0), default=None)

    def _queue(self) -> list[dict[str, Any]]:
        """All managed jobs, as they were at most `poll_seconds` ago."""
        if self._known is not None and 0.0 <= self.clock() - self._known[0] < self.settings.poll_seconds:
            return self._known[1]
        answer = self._sky("jobs", "queue", "--all", "--verbose", "--output", "json")
        if answer.code:
            raise failure(answer, re.compile(""))  # whatever it says: nothing is known now
        self._known = self.clock(), _json_in(answer.output)
        return self._known[1]

    def _sky(self, *arguments: str) -> Answer:
        return ask(["sky", *arguments], seconds=self.settings.command_seconds)


def _told(reason: str, otherwise: int) -> int:
    """The exit code that SkyPilot's reason for a failure names: the first that is none of 0."""
    if (match := _EXIT.search(reason)) is None:
        return otherwise
    return next((int(code) for code in match[1].split(", ") if code and int(code)), otherwise)


def _json_in(output: str) -> list[dict[str, Any]]:
    """The list that sky prints, after whatever else it has to say."""
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("["):
            try:
                found = parse_json("\n".join(lines[number:]), "sky's answer", FileError, expect=list)
            except FileError:
                continue
            return [item for item in found if isinstance(item, dict)]
    raise EngineUnavailableError("sky jobs queue", expected="a JSON list", got=output[-200:])
