"""For each row of ENGINES the engine with a stand-in for what it starts runs on, and what a test may do to that."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from kdscale.service.engines import supervisor
from kdscale.service.engines.engine import Engine, Job, JobState, make_engine
from kdscale.service.engines.local import LocalEngine
from kdscale.service.engines.marks import end_marked
from kdscale.service.settings import ServiceSettings
from kdscale_launch.systems import notes
from tests.unit.service.engines import stand_in

PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "kubectl", "sky")
_LONG = 30.0


def until(holds: Callable[[], object]) -> None:
    """Wait for real processes."""
    deadline = time.monotonic() + _LONG
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class Bench:
    """What every engine's surroundings can do. `clock` is the time that the engine sees."""

    engine_name: str
    program: str = ""  # whose failure means that the system does not answer

    def __init__(self, folder: Path, **own: Any):
        self.folder, self.own, self.clock = folder, own, 1_000_000.0

    def engine(self) -> Engine:
        """The engine, made anew as a service does that was started again."""
        home = str(self.folder / "home")
        engine = make_engine(self.engine_name, ServiceSettings(home=home, engines={self.engine_name: self.settings()}))
        if hasattr(engine, "clock"):
            engine.clock = self.now
        return engine

    def now(self) -> float:
        """The time that the engine sees."""
        return self.clock

    def settings(self) -> dict[str, Any]:
        """The engine's part of serve.yaml."""
        return self.own

    def job(self, attempt: int = 1, run_id: str = "0abcdefgh-0000001", **fields: Any) -> Job:
        """An attempt with a config of its own."""
        folder = self.folder / "home" / "runs" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(
            f"name: tiny\nrun_dir: {json.dumps(str(folder))}\nteacher: {{path: /none}}\n"
            "prune: {target_params: 50%}\ndistill: {micro_batch: 1}\n"
        )
        work = self.folder / "home" / "jobs" / run_id / str(attempt)
        return Job(run_id, attempt, folder, folder / "config.yaml", work, **fields)

    def state(self, handle: str) -> JobState:
        """How the attempt is, as an engine says that was made anew."""
        return self.engine().state(handle)

    # what happens outside the service
    def begin(self, job: Job) -> None: ...
    def finish(self, job: Job, code: int) -> None: ...
    def vanish(self, job: Job) -> None: ...
    def preempt(self, job: Job) -> None: ...
    def forget(self, job: Job) -> None: ...
    def count(self) -> int: ...  # type: ignore[empty-body]
    def was_told(self, job: Job) -> bool: ...  # type: ignore[empty-body]
    def close(self) -> None: ...


class ProcessBench(Bench):
    """Real processes on this machine: a shell in the place of a training."""

    def engine(self) -> Engine:
        engine = super().engine()
        assert isinstance(engine, LocalEngine)
        script = "trap 'touch told' TERM; echo $$ >> starts; while [ ! -e code ]; do sleep 0.02; done; exit $(cat code)"
        engine._command = lambda job: ["sh", "-c", f"cd '{job.work}' && {script}"]
        return engine

    def begin(self, job: Job) -> None:
        until((job.work / "starts").exists)

    def finish(self, job: Job, code: int) -> None:
        (job.work / "code.new").write_text(str(code))
        (job.work / "code.new").rename(job.work / "code")
        until(lambda: self.state(str(job.work)).phase == "ended")

    def vanish(self, job: Job) -> None:
        started = json.loads((job.work / supervisor.STARTED).read_text())
        os.kill(started["supervisor"], signal.SIGKILL)
        until(lambda: self.state(str(job.work)).phase == "lost")

    def count(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.folder.rglob("starts"))

    def was_told(self, job: Job) -> bool:
        until((job.work / "told").exists)
        return True

    def close(self) -> None:
        for work in self.folder.glob("home/jobs/*/*"):
            assert end_marked(str(work))


class LocalBench(ProcessBench):
    engine_name = "local"


class HostsBench(ProcessBench):
    engine_name = "hosts"


class ClusterBench(Bench):
    """A cluster that is one JSON file, moved on by the test."""

    def __init__(self, folder: Path, **own: Any):
        super().__init__(folder, **own)
        self.before: dict[str, Callable[[], None]] = {}  # what happens just before a program is called
        tools = folder / "bin"
        tools.mkdir()
        text = (Path(__file__).parent / "stand_in.py").read_text()
        (tools / "stand_in.py").write_text(f"#!{sys.executable} -ISE\n{text}")
        (tools / "stand_in.py").chmod(0o755)
        for name in PROGRAMS:
            (tools / name).symlink_to("stand_in.py")
        self.tools, self.file = tools, tools / "state.json"
        empty: dict[str, Any] = {
            "jobs": [],
            "objects": {},
            "pods": {},
            "made": 0,
            "managed": [],
            "faults": [],
            "calls": [],
        }
        self.write(empty)

    def run(self, command: Sequence[str], seconds: float, *, stdin: str, env: Any, stdout: Any) -> Any:
        """In the place of kdscale.service.engines.programs._run: the same call without a process, which is fast."""
        if command[0] in self.before:
            self.before.pop(command[0])()
        output, complaint = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(complaint):
            words = [str(self.tools / command[0]), *command[1:]]
            code = stand_in.main(words, stdin, os.environ if env is None else env)
        text = output.getvalue().encode()
        if stdout != subprocess.PIPE:
            stdout.write(text)
            stdout.flush()
        return subprocess.CompletedProcess(command, code, text, complaint.getvalue().encode())

    def read(self) -> dict[str, Any]:
        """The cluster."""
        state: dict[str, Any] = json.loads(self.file.read_text())
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Make it so."""
        self.file.write_text(json.dumps(state))

    def change(self, **changes: Any) -> None:
        """Change what is said of the whole cluster."""
        self.write({**self.read(), **changes})

    def fault(self, program: str = "", times: int = 1, code: int = 1, says: str = "", **more: Any) -> None:
        """Let the next calls fail."""
        fault = {"program": program or self.program, "times": times, "code": code, "says": says, **more}
        self.change(faults=[*self.read()["faults"], fault])

    def leave(self, job: Job, code: int, node: int = 0) -> None:
        """What the job itself does at its end."""
        notes.leave_exit_code(job.work / "notes", node, code)

    def was_told(self, job: Job) -> bool:
        return notes.is_asked_to_stop(job.work / "notes")


class SlurmBench(ClusterBench):
    engine_name, program = "slurm", "squeue"

    def set(self, job: Job, queue: list[str] | None, account: list[str] | None) -> None:
        """What slurmctld and slurmdbd say of the newest job of this attempt."""
        state = self.read()
        name = f"kdscale-{job.run_id}-{job.attempt}"
        [item for item in state["jobs"] if item["name"] == name][-1].update(queue=queue, account=account)
        self.write(state)

    def begin(self, job: Job) -> None:
        self.set(job, ["RUNNING", "None"], ["RUNNING", "0:0"])

    def finish(self, job: Job, code: int) -> None:
        self.leave(job, code)
        end = "FAILED" if code else "COMPLETED"
        self.set(job, [end, "NonZeroExitCode" if code else "None"], [end, f"{code}:0"])

    def vanish(self, job: Job) -> None:
        self.set(job, None, None)

    forget = vanish

    def preempt(self, job: Job) -> None:
        self.leave(job, 75)
        self.set(job, ["PENDING", "BeginTime"], ["REQUEUED", "0:0"])

    def count(self) -> int:
        return len(self.read()["jobs"])

    def was_told(self, job: Job) -> bool:
        return super().was_told(job) and self.read()["jobs"][-1]["signals"] == ["TERM"]


class KubernetesBench(ClusterBench):
    engine_name, program = "kubernetes", "kubectl"

    def settings(self) -> dict[str, Any]:
        return {"image": "registry/kdscale:1", "queue": "team", "volumes": {"shared": "/data"}, **self.own}

    def update(self, job: Job, suspend: bool, status: dict[str, Any], pods: int = 0) -> None:
        """What the controllers make of this attempt's JobSet."""
        state = self.read()
        name = f"kdscale-{job.run_id}-{job.attempt}"
        found = state["objects"]["default"][name]
        found["spec"]["suspend"], found["status"] = suspend, status
        state["pods"][name] = [{"status": {}}] * pods
        self.write(state)

    def begin(self, job: Job) -> None:
        self.update(job, False, {"replicatedJobsStatus": [{"name": "nodes", "ready": 1, "active": 1}]}, pods=1)

    def finish(self, job: Job, code: int) -> None:
        self.leave(job, code)
        # a node that was asked to stop leaves with 0, whatever it noted
        failed = code not in (0, 75)
        name, reason = ("Failed", "FailedJobs") if failed else ("Completed", "AllJobsCompleted")
        conditions = [{"type": name, "status": "True", "reason": reason, "message": "jobset"}]
        self.update(job, False, {"terminalState": name, "conditions": conditions})

    def vanish(self, job: Job) -> None:
        self.change(objects={}, pods={})

    forget = vanish

    def preempt(self, job: Job) -> None:
        self.leave(job, 75)
        self.update(job, True, {"conditions": [{"type": "Suspended", "status": "True"}]})

    def count(self) -> int:
        return int(self.read()["made"])


class SkyPilotBench(ClusterBench):
    engine_name, program = "skypilot", "sky"

    def set(self, job: Job, status: str, **more: Any) -> None:
        """What the controller says of this attempt's newest job."""
        state = self.read()
        name = f"kdscale-{job.run_id}-{job.attempt}"
        [item for item in state["managed"] if item["job_name"] == name][-1].update(status=status, **more)
        self.write(state)

    def begin(self, job: Job) -> None:
        self.set(job, "RUNNING")

    def finish(self, job: Job, code: int) -> None:
        self.leave(job, code)
        failed = code not in (0, 75)
        self.set(job, "FAILED" if failed else "SUCCEEDED", failure_reason="see the logs" if failed else None)

    def vanish(self, job: Job) -> None:
        self.change(managed=[{**item, "late": 10**6} for item in self.read()["managed"]])

    forget = vanish

    def preempt(self, job: Job) -> None:
        self.set(job, "RECOVERING", recovery_count=1)

    def count(self) -> int:
        return len(self.read()["managed"])


BENCHES: dict[str, type[Bench]] = {
    bench.engine_name: bench for bench in (LocalBench, HostsBench, SlurmBench, KubernetesBench, SkyPilotBench)
}
