"""A config as a job for several hosts: the command of a rank, preflight on every host, the run itself."""

from __future__ import annotations

import json
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdscale.config.load import load_config
from kdscale.config.root import Config
from kdscale.errors import ConfigError, KdscaleError
from kdscale.jobs import preflight
from kdscale.jobs.doctor import Finding
from kdscale.pipeline.stages.registry import job_targets
from kdscale.runtime.exits import FINAL_CODES
from kdscale_launch import (
    Host,
    HostConnections,
    HostsJob,
    JobFailed,
    LaunchError,
    Outcome,
    SshSettings,
    Task,
    run_hosts,
    total_slots,
)
from kdscale_launch.environment import forwarded_variables, masked_lines
from kdscale_launch.hosts.hostfile import first_ranks

RANK_MODULE = "kdscale.jobs.rank"


_PROBE_SECONDS = 180.0


class LaunchedJobError(KdscaleError):
    """A job that ended with an error; its exit code is that of the rank that failed first."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class LaunchRequest:
    """What was asked for: the config as given on the command line, and the same resolved for this many ranks."""

    path: Path
    overrides: tuple[str, ...]
    config: Config
    accept_changes: bool = False
    until: str = "report"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a rank needs to come to the same config."""
        flags = [f"--until={self.until}"] if self.until != "report" else []
        flags += ["--accept-changes"] if self.accept_changes else []
        return (self.file, *flags, *self.overrides)

    @property
    def file(self) -> str:
        return str(self.path.absolute())

    @property
    def logs(self) -> Path:
        return Path(self.config.run_dir).absolute() / "logs"


def request(path: Path, overrides: Sequence[str], ranks: int, accept: bool, until: str = "report") -> LaunchRequest:
    """The config with `distill.processes` set to `ranks`. Raises ConfigError when they cannot share the batch."""
    if until not in job_targets():
        raise ConfigError("--until", expected=f"one of {', '.join(job_targets())}", got=until)
    if any(item.partition("=")[0] == "distill.processes" for item in overrides):
        raise ConfigError("--set distill.processes", expected="no such setting: it is the number of slots")
    full = (*overrides, f"distill.processes={ranks}")
    return LaunchRequest(path, full, load_config(path, full), accept, until)


def commands_for_fewer_hosts(
    asked: LaunchRequest, hosts: Sequence[Host], min_nodes: int, python: str = sys.executable
) -> dict[int, tuple[str, ...]]:
    """The command of a rank by the number of hosts, from `min_nodes` to one less than all.

    Numbers whose ranks cannot share the batch are left out. Raises ConfigError when `min_nodes` is one of them, or when
    the hosts have different numbers of slots.
    """
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        raise ConfigError(
            f"--min-nodes {min_nodes}",
            expected="the same number of slots on every host",
            got=", ".join(f"{host.name}: {host.slots}" for host in hosts),
        )
    own = [item for item in asked.overrides if not item.startswith("distill.processes=")]
    commands: dict[int, tuple[str, ...]] = {}
    for number in range(min_nodes, len(hosts)):
        try:
            fewer = request(asked.path, own, total_slots(hosts[:number]), asked.accept_changes, asked.until)
        except ConfigError as error:
            if number == min_nodes:
                raise ConfigError(f"--min-nodes {min_nodes} cannot be used", got=str(error)) from error
        else:
            commands[number] = rank_command(fewer, python)
    return commands


def rank_command(asked: LaunchRequest, python: str = sys.executable) -> tuple[str, ...]:
    return (python, "-m", RANK_MODULE, *asked.arguments)


def preflight_command(asked: LaunchRequest, python: str, what: str, argument: str) -> tuple[str, ...]:
    return (python, "-m", "kdscale.jobs.preflight", what, argument, asked.file, *asked.overrides)


def python_path() -> str:
    """PYTHONPATH as it is here, made absolute: a checkout works on the other hosts as it does on this one."""
    parts = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(part).absolute()) for part in parts if part)


def hosts_job(
    asked: LaunchRequest, hosts: Sequence[Host], reach: SshSettings, export: Sequence[str], **settings: Any
) -> HostsJob:
    return HostsJob(
        hosts=tuple(hosts),
        command=rank_command(asked, reach.python),
        reach=reach,
        log_dir=str(asked.logs / "ranks"),
        env={**rank_defaults(), **forwarded_variables(os.environ, export), "PYTHONPATH": reach.pythonpath},
        final_codes=FINAL_CODES,
        **settings,
    )


def describe(job: HostsJob) -> str:
    """What `run` would do, as text: the connection to each host, the command of each rank, its variables."""
    address = job.master_addr or job.hosts[0].address
    lines = []
    for host, first in zip(job.hosts, first_ranks(job.hosts), strict=True):
        lines += [f"# {host.name}: ranks {first} to {first + host.slots - 1}", shlex.join(job.reach.command(host))]
    lines += ["# then, over the connection's stdin, once a rank:", shlex.join(job.command)]
    lines += ["# with, beside RANK, LOCAL_RANK and LOCAL_WORLD_SIZE, these variables:"]
    port = str(job.master_port) if job.master_port else "(one that is free on the first host)"
    about = {"WORLD_SIZE": str(total_slots(job.hosts)), "MASTER_ADDR": address, "MASTER_PORT": port}
    lines += [f"#   {line}" for line in masked_lines({**about, **job.env})]
    if job.smaller:
        counts = ", ".join(map(str, sorted(job.smaller)))
        lines += [f"# when hosts do not come back, also on {counts} of {len(job.hosts)}"]
    lines += [f"# logs: {job.log_dir}/ATTEMPT/rank-N.log", f"# restarts: at most {job.max_restarts}"]
    return "\n".join(lines)


def rank_defaults() -> dict[str, str]:
    """What the command line sets for itself: see kdscale.cli.main."""
    return {"OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}


def run(job: HostsJob, received: Sequence[int], say: Callable[[str], None], output: Callable[[str], None]) -> int:
    """See `run_hosts`. Raises LaunchedJobError."""
    try:
        return run_hosts(job, received, say, output)
    except JobFailed as error:
        raise LaunchedJobError(f"{error}\n  to do:    the ranks' logs are in {job.log_dir}", error.exit_code) from error
    except LaunchError as error:
        raise ConfigError(str(error)) from error


def run_preflight(
    job: HostsJob, asked: LaunchRequest, received: Sequence[int], collective_seconds: float = 60.0
) -> list[Finding]:
    """Preflight: every host is asked, then all ranks add up a number. Findings in the order they were made."""
    with HostConnections(job.hosts, job.reach, received) as cluster:
        unreachable = cluster.connect()
        findings = [_reached(job.hosts, unreachable)]
        if unreachable or received:
            return findings
        base = Task(command=(), env=job.env, ranks=False, deadline=_PROBE_SECONDS)
        preflight_on_hosts = _PreflightOnHosts(cluster, base, asked, job.reach.python)
        skews = {job.hosts[index].name: skew for index, skew in cluster.clock_skews().items()}
        findings += preflight_on_hosts.probe(skews)
        if all(finding.severity != "bad" for finding in findings):
            findings += [preflight_on_hosts.collective(job, collective_seconds)]
        return findings


def _reached(hosts: Sequence[Host], unreachable: Mapping[int, str]) -> Finding:
    problems = "; ".join(f"{hosts[index].name}: {why}" for index, why in unreachable.items())
    return Finding(
        "hosts", "bad" if problems else "ok", problems or f"{len(hosts)} reached, {total_slots(hosts)} slots"
    )


class _PreflightOnHosts:
    """Runs preflight's commands on the hosts and reads their answers."""

    def __init__(self, cluster: HostConnections, base: Task, asked: LaunchRequest, python: str):
        self._cluster, self._base, self._asked, self._python = cluster, base, asked, python
        self._mark = uuid.uuid4().hex[:12]

    def probe(self, skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
        hosts = self._cluster.hosts
        marks = {f"{self._mark}-{index}": host.name for index, host in enumerate(hosts)}
        try:
            reports, problem = self._ask("probe", self._mark)
            if problem:
                return [problem]
            found = preflight.judge(reports, {host.name: host.slots for host in hosts}, skews)
            if any(report["config_error"] or report["write_error"] for report in reports.values()):
                return found
            missing, problem = self._ask("shared", ",".join(marks))
            seen = {host: [marks[mark] for mark in missed] for host, missed in missing.items()}
            return [*found, problem or preflight.judge_shared(seen)]
        finally:
            self._ask("clean", ",".join(marks))

    def collective(self, job: HostsJob, seconds: float) -> Finding:
        """All ranks meet as the job's would: same addresses, same interface, same backend."""
        port = job.master_port or self._cluster.free_port()
        if port is None:
            return Finding("collective", "bad", f"{job.hosts[0].name} does not answer")
        task = replace(
            self._base, command=self._command("collective", f"{seconds:g}"), ranks=True,
            deadline=seconds + _PROBE_SECONDS,
            master_addr=job.master_addr or job.hosts[0].address,
            master_port=port,
        )  # fmt: skip
        outcome = self._cluster.run(task)
        if not outcome.ok:
            return Finding("collective", "bad", _failure(outcome))
        answer = _answer(outcome.said[0])
        trip, rate = answer["milliseconds"], answer["megabytes_per_second"]
        return Finding("collective", "ok", f"{total_slots(job.hosts)} ranks: {trip:.2f} ms, {rate:.0f} MB/s of 4 MB")

    def _ask(self, what: str, argument: str) -> tuple[dict[str, Any], Finding | None]:
        """Each host's answer by name, or the finding that it could not be had."""
        outcome = self._cluster.run(replace(self._base, command=self._command(what, argument)))
        if not outcome.ok:
            return {}, Finding(what, "bad", _failure(outcome))
        answers = [_answer(outcome.said[rank]) for rank in sorted(outcome.said)]
        return dict(zip((host.name for host in self._cluster.hosts), answers, strict=True)), None

    def _command(self, what: str, argument: str) -> tuple[str, ...]:
        return preflight_command(self._asked, self._python, what, argument)


def _failure(outcome: Outcome) -> str:
    return outcome.describe() if outcome.failures else "stopped"


def _answer(said: str) -> Any:
    """The JSON on the last line; libraries may have printed before it."""
    return json.loads(said.splitlines()[-1])
