"""A config as a job for several hosts: the command of a rank, preflight on every host, and the run itself."""

from __future__ import annotations

import json
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, KdscaleError, MissingProgramError
from kdscale.jobs import preflight
from kdscale.jobs.doctor import Finding
from kdscale.pipeline.stages.registry import job_targets
from kdscale.runtime.exits import FINAL_CODES
from kdscale_launch.environment import check_text, forwarded_variables, masked_lines, without_credentials
from kdscale_launch.hosts.connections import HostConnections, Task
from kdscale_launch.hosts.failure import Outcome
from kdscale_launch.hosts.hostfile import Host, first_ranks, total_slots
from kdscale_launch.hosts.restarts import HostsJob, JobFailed, run_hosts
from kdscale_launch.hosts.ssh import SshSettings
from kdscale_launch.job import CannotStart, LaunchError

RANK_MODULE = "kdscale.jobs.rank"
LAST_STAGE = job_targets()[-1]
_PROBE_SECONDS = 180.0


class LaunchedJobError(KdscaleError):
    """A job that ended with an error; its exit code is that of the rank that failed first."""

    def __init__(self, what: str, *, exit_code: int = 1, hint: str | None = None):
        super().__init__(what, hint=hint)
        self.exit_code = exit_code


@contextmanager
def launcher_errors(option: str = "") -> Iterator[None]:
    """Raise the launcher's errors as kdscale's: MissingProgramError, or ConfigError about `option` (if given)."""
    try:
        yield
    except CannotStart as error:
        raise MissingProgramError(str(error), hint="install it, or check its name and PATH") from error
    except LaunchError as error:
        raise (ConfigError(option, got=str(error)) if option else ConfigError(str(error))) from error


@dataclass(frozen=True)
class LaunchRequest:
    """The config as given on the command line, and the same resolved for the job's number of ranks."""

    path: Path
    overrides: tuple[str, ...]
    config: Config
    accept_changes: bool = False
    until: str = LAST_STAGE

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments from which a rank resolves the same config."""
        flags = [f"--until={self.until}"] if self.until != LAST_STAGE else []
        flags += ["--accept-changes"] if self.accept_changes else []
        return (self.file, *flags, *self.overrides)

    @property
    def file(self) -> str:
        """The absolute path of the config file."""
        return str(self.path.absolute())

    @property
    def logs(self) -> Path:
        """The log folder of the run."""
        return Path(self.config.run_dir).absolute() / "logs"

    def rank_command(self, python: str = sys.executable) -> tuple[str, ...]:
        """The command of every rank."""
        return (python, "-m", RANK_MODULE, *self.arguments)

    def preflight_command(self, python: str, command: str, argument: str) -> tuple[str, ...]:
        """One of preflight's commands, as it runs on a host."""
        return (python, "-m", "kdscale.jobs.preflight", command, argument, self.file, *self.overrides)


def make_request(
    path: Path, overrides: Sequence[str], ranks: int, accept_changes: bool, until: str = LAST_STAGE
) -> LaunchRequest:
    """The request with `distill.processes` set to `ranks`. Raises ConfigError when they cannot share the batch."""
    if until not in job_targets():
        raise ConfigError("--until", expected=f"one of {', '.join(job_targets())}", got=until)
    if any(item.partition("=")[0] == "distill.processes" for item in overrides):
        raise ConfigError("--set distill.processes", expected="no such setting: it is the number of slots")
    resolved = (*overrides, f"distill.processes={ranks}")
    config = load_config(path, resolved)
    with launcher_errors():  # both end up in scripts, manifests and remote shells
        check_text("config and --set", str(path.absolute()), *resolved)
        check_text("run_dir", config.run_dir)
    return LaunchRequest(path, resolved, config, accept_changes, until)


def commands_for_fewer_hosts(
    request: LaunchRequest, hosts: Sequence[Host], min_nodes: int, python: str = sys.executable
) -> dict[int, tuple[str, ...]]:
    """The command of a rank by the number of hosts, from `min_nodes` to one less than all.

    Numbers whose ranks cannot share the batch are left out. Raises ConfigError when `min_nodes` is one of them, or when
    the hosts have different numbers of slots.
    """
    if len({host.slots for host in hosts}) > 1:
        raise ConfigError(
            f"--min-nodes {min_nodes}",
            expected="the same number of slots on every host",
            got=", ".join(f"{host.name}: {host.slots}" for host in hosts),
        )
    overrides = [item for item in request.overrides if not item.startswith("distill.processes=")]
    commands: dict[int, tuple[str, ...]] = {}
    for number in range(min_nodes, len(hosts)):
        ranks = total_slots(hosts[:number])
        try:
            fewer = make_request(request.path, overrides, ranks, request.accept_changes, request.until)
        except ConfigError as error:
            if number == min_nodes:
                raise ConfigError(f"--min-nodes {min_nodes} cannot be used", got=str(error)) from error
        else:
            commands[number] = fewer.rank_command(python)
    return commands


def python_path() -> str:
    """PYTHONPATH with absolute paths: a checkout works on the other hosts as it does on this one."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(folder).absolute()) for folder in folders if folder)


def rank_defaults() -> dict[str, str]:
    """Variables that every rank gets: what the command line sets for itself (kdscale.cli.main), and no buffering."""
    return {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}


def hosts_job(
    request: LaunchRequest, hosts: Sequence[Host], ssh: SshSettings, export: Sequence[str], **settings: Any
) -> HostsJob:
    """The request as a job on these hosts; `export` names more variables to send, `settings` are HostsJob's."""
    return HostsJob(
        hosts=tuple(hosts),
        command=request.rank_command(ssh.python),
        ssh=ssh,
        log_dir=str(request.logs / "ranks"),
        env={**rank_defaults(), **forwarded_variables(os.environ, export), "PYTHONPATH": ssh.pythonpath},
        final_codes=FINAL_CODES,
        **settings,
    )


def describe_job(job: HostsJob) -> str:
    """What `run_job` would do, as text: the connection to each host, the command of each rank, its variables."""
    lines = []
    for host, first in zip(job.hosts, first_ranks(job.hosts), strict=True):
        lines += [f"# {host.name}: ranks {first} to {first + host.slots - 1}", shlex.join(job.ssh.command(host))]
    lines += ["# then, over the connection's stdin, once per rank:", shlex.join(job.command)]
    lines += ["# with these variables, besides RANK, LOCAL_RANK and LOCAL_WORLD_SIZE:"]
    port = str(job.master_port) if job.master_port else "(one that is free on the first host)"
    meeting = {"WORLD_SIZE": str(total_slots(job.hosts)), "MASTER_ADDR": job.first_address, "MASTER_PORT": port}
    lines += [f"#   {line}" for line in masked_lines({**meeting, **job.env})]
    if job.fewer_hosts:
        counts = ", ".join(map(str, sorted(job.fewer_hosts)))
        lines += [f"# when hosts do not come back, also on {counts} of {len(job.hosts)}"]
    lines += [f"# logs: {job.log_dir}/ATTEMPT/rank-N.log", f"# restarts: at most {job.max_restarts}"]
    return without_credentials("\n".join(lines))


def run_job(
    job: HostsJob, received_signals: Sequence[int], report: Callable[[str], None], output: Callable[[str], None]
) -> int:
    """See `kdscale_launch.run_hosts`. Raises LaunchedJobError, and MissingProgramError when there is no ssh."""
    with launcher_errors():
        try:
            return run_hosts(job, received_signals, report, output)
        except JobFailed as error:
            logs = f"the ranks' logs are in {job.log_dir}"
            raise LaunchedJobError(str(error), exit_code=error.exit_code, hint=logs) from error


def run_preflight(
    job: HostsJob, request: LaunchRequest, received_signals: Sequence[int], collective_seconds: float = 60.0
) -> list[Finding]:
    """Check every host, then let all ranks add up a number. Findings in the order in which they were made.

    Raises MissingProgramError when there is no ssh.
    """
    with launcher_errors(), HostConnections(job.hosts, job.ssh, received_signals) as connections:
        unreachable = connections.connect()
        problems = "; ".join(f"{job.hosts[index].name}: {reason}" for index, reason in unreachable.items())
        reached = f"{len(job.hosts)} reached, {total_slots(job.hosts)} slots"
        findings = [Finding("hosts", "bad" if problems else "ok", problems or reached)]
        if unreachable or received_signals:
            return findings
        checks = _HostChecks(connections, job, request)
        skews = {job.hosts[index].name: skew for index, skew in connections.clock_skews().items()}
        findings += checks.compare_hosts(skews)
        if all(finding.severity != "bad" for finding in findings):
            findings += [checks.collective(collective_seconds)]
        return findings


class _HostChecks:
    """Runs preflight's commands on the hosts and reads their answers."""

    def __init__(self, connections: HostConnections, job: HostsJob, request: LaunchRequest):
        self._connections, self._job, self._request = connections, job, request
        self._task = Task(command=(), env=job.env, per_slot=False, deadline_seconds=_PROBE_SECONDS)
        self._mark = uuid.uuid4().hex[:12]

    def compare_hosts(self, skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
        """What the hosts report of themselves, and whether they share the run folder. Nothing is left on disk."""
        hosts = self._connections.hosts
        marks = {f"{self._mark}-{index}": host.name for index, host in enumerate(hosts)}
        try:
            reports, problem = self._ask("probe", self._mark)
            if problem:
                return [problem]
            findings = preflight.compare_reports(reports, {host.name: host.slots for host in hosts}, skews)
            if any(report["config_error"] or report["write_error"] for report in reports.values()):
                return findings
            unseen, problem = self._ask("shared", ",".join(marks))
            missing = {host: [marks[mark] for mark in host_marks] for host, host_marks in unseen.items()}
            return [*findings, problem or preflight.check_shared_folder(missing)]
        finally:
            self._ask("clean", ",".join(marks))

    def collective(self, seconds: float) -> Finding:
        """All ranks meet as the job's would: same addresses, same interface, same backend."""
        port = self._job.master_port or self._connections.free_port()
        if port is None:
            return Finding("collective", "bad", f"{self._job.hosts[0].name} does not answer")
        task = replace(
            self._task, command=self._command("collective", f"{seconds:g}"), per_slot=True,
            deadline_seconds=seconds + _PROBE_SECONDS, master_addr=self._job.first_address, master_port=port,
        )  # fmt: skip
        outcome = self._connections.run(task)
        if not outcome.ok:
            return Finding("collective", "bad", _describe_problem(outcome))
        answer = _parse_answer(outcome.log_tails[0])
        trip, rate = answer["milliseconds"], answer["megabytes_per_second"]
        ranks = total_slots(self._job.hosts)
        return Finding("collective", "ok", f"{ranks} ranks: {trip:.2f} ms, {rate:.0f} MB/s for 4 MB")

    def _ask(self, command: str, argument: str) -> tuple[dict[str, Any], Finding | None]:
        """Each host's answer by name, or the finding that there is none."""
        outcome = self._connections.run(replace(self._task, command=self._command(command, argument)))
        if not outcome.ok:
            return {}, Finding(command, "bad", _describe_problem(outcome))
        answers = [_parse_answer(outcome.log_tails[rank]) for rank in sorted(outcome.log_tails)]
        return dict(zip((host.name for host in self._connections.hosts), answers, strict=True)), None

    def _command(self, command: str, argument: str) -> tuple[str, ...]:
        return self._request.preflight_command(self._job.ssh.python, command, argument)


def _describe_problem(outcome: Outcome) -> str:
    return outcome.describe() if outcome.failures else "stopped"


def _parse_answer(log_tail: str) -> Any:
    """The JSON on the last line; libraries may have printed before it."""
    return json.loads(log_tail.splitlines()[-1])
