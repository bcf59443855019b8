"""Runs on this machine, each under a supervisor of its own that outlives the service.

The files of an attempt's folder are all that the engine knows: they are listed in `supervisor`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdscale.errors import MachineError
from kdscale.files import explain_os_errors, open_plain, read_own_json, write_json
from kdscale.jobs.launch import python_path
from kdscale.runtime.locks import is_locked
from kdscale.service.engines import supervisor as attempt
from kdscale.service.engines.engine import Job, JobState
from kdscale.service.engines.marks import end_marked
from kdscale.service.settings import ServiceSettings
from kdscale_launch.environment import without_secrets
from kdscale_launch.job import describe_exit
from kdscale_launch.processes import tail

_BEGIN_SECONDS = 60.0  # a start of Python on a machine that is very busy
_SWEEP_SECONDS = 2.0


class LocalEngine:
    """Process groups on this machine. A handle is the path of the attempt's folder."""

    name = "local"

    def __init__(self, settings: ServiceSettings | None = None):
        self._folder = str(Path.cwd())  # relative paths in a config mean what they mean to `kdscale run` started here

    def submit(self, job: Job) -> str:
        """See Engine. Raises MachineError when no process can be started."""
        work = job.work
        with explain_os_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        if not (work / attempt.REQUEST).exists():
            request = {"command": self._command(job), "folder": self._folder, "mark": _mark(work)}
            write_json(work / attempt.REQUEST, request)
        if not ((work / attempt.STARTED).exists() or (work / attempt.EXIT).exists()):
            self._start(work, job)
        return str(work)

    def _command(self, job: Job) -> list[str]:
        """The command line of the run."""
        command = [sys.executable, "-m", "kdscale.cli.main", "run", str(job.config)]
        return command + (["--set", f"distill.processes={job.slots}"] if job.slots > 1 else [])

    def _start(self, work: Path, job: Job) -> None:
        """Start the supervisor; returns when it has left this process and begun, or found that another one has."""
        command = [sys.executable, "-m", "kdscale.service.engines.supervisor", str(work)]
        with (work / attempt.OWN_LOG).open("ab") as log:
            try:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(job, os.environ),
                    start_new_session=True, timeout=_BEGIN_SECONDS, check=False,
                ).returncode  # fmt: skip
            except OSError as error:
                raise MachineError("the run's supervisor cannot be started", got=str(error)) from error
            except subprocess.TimeoutExpired:
                code = 0 if is_locked(work / attempt.LOCK) else -signal.SIGKILL  # it begins soon, or it was ended now
        if code:
            raise MachineError(
                f"the supervisor of run {job.run_id} {describe_exit(code)}", got=tail(work / attempt.OWN_LOG)
            )

    def state(self, handle: str) -> JobState:
        """See Engine. Of an attempt that is lost, no process is left."""
        work = Path(handle)
        # in this order: a supervisor has the lock before it writes that it began, until after it wrote how it ended
        begun = (work / attempt.STARTED).exists()
        held = is_locked(work / attempt.LOCK)
        ended = read_own_json(work / attempt.EXIT, _is_exit)
        if ended is not None:
            return JobState("ended", ended["exit_code"])
        if held:
            return JobState("running" if begun else "waiting")
        if not begun:  # `submit` returns when it has begun
            return JobState("lost", reason="it never began")
        # a run dies with its supervisor, but not at the same instant
        if not end_marked(_mark(work), _SWEEP_SECONDS):
            return JobState("running", reason="its supervisor is gone and it is being ended")
        return JobState("lost", reason="its supervisor was killed, or the machine went down")

    def logs(self, handle: str, tail_bytes: int) -> bytes:
        """See Engine."""
        try:
            with open_plain(Path(handle) / attempt.OUTPUT) as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - tail_bytes))
                return stream.read(tail_bytes)
        except OSError:  # nothing yet
            return b""

    def cancel(self, handle: str, *, grace: float) -> None:
        """See Engine. What is asked for is in a file, so the end comes in time without the service, too."""
        path, deadline = Path(handle) / attempt.STOP, time.time() + grace
        asked = read_own_json(path, attempt.is_stop)
        if asked is None or deadline < asked["deadline"]:
            write_json(path, {"deadline": deadline})

    def requeue(self, handle: str, job: Job) -> str:
        """See Engine."""
        return self.submit(job)


def _mark(work: Path) -> str:
    """What the processes of an attempt carry: two services on one machine may have runs of the same id."""
    return str(work.absolute())


def _is_exit(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("exit_code")) is int


def _environment(job: Job, own: Mapping[str, str]) -> dict[str, str]:
    """The service's variables without secrets, and the attempt's devices.

    Hubs and trackers have files for their tokens in the home folder, which a run reads as it does without a service.
    """
    environment = {**without_secrets(own), "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(job.devices)} if job.devices else {})
