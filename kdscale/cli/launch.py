"""`kdscale launch` and `kdscale preflight`: a run on several hosts, by ssh or through a job system."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli.arguments import AcceptOption, ConfigArgument, SetOption
from kdscale.errors import ConfigError
from kdscale.pipeline.stages.registry import job_targets
from kdscale_launch.job import GRACE_SECONDS

if TYPE_CHECKING:
    from kdscale.jobs.launch import LaunchRequest
    from kdscale_launch import Host, HostsJob

_HOSTS, _SYSTEMS = "Hosts over ssh", "Job systems"
_STAGES = job_targets()


class Launcher(StrEnum):
    """What starts the ranks on the hosts of a hostfile."""

    ssh = "ssh"
    deepspeed = "deepspeed"


_FROM_0, _FROM_1 = (0, 65_536), (1, 65_536)  # how many of something a job has


def _option(
    names: str,
    text: str,
    panel: str | None = None,
    metavar: str | None = None,
    between: tuple[int, int] | None = None,
    default_in_words: str | None = None,
) -> object:
    """`between`: the range of a number. `default_in_words` is for defaults that differ from machine to machine."""
    shown = True if default_in_words is None else default_in_words
    least, most = between or (None, None)
    return typer.Option(
        *names.split(), help=text, rich_help_panel=panel, metavar=metavar, min=least, max=most, show_default=shown
    )


def _seconds(name: str, text: str, panel: str | None = None) -> object:
    """An option that is a time, of at most 30 days."""
    return _option(name, text, panel, "SECONDS", (0, 30 * 86_400))


# fmt: off
Repeatable = list[str] | None
HostfileOption = Annotated[
    Path | None, _option("--hostfile -H", "Hosts in DeepSpeed's format: one `name slots=N` per line.", _HOSTS, "FILE")]
SshOption = Annotated[str, _option("--ssh-command", "The command to use instead of ssh, with its options.", _HOSTS)]
PythonOption = Annotated[
    str, _option("--python", "The Python interpreter on the hosts.", _HOSTS, "PATH", default_in_words="this one")]
AddressOption = Annotated[
    str, _option("--master-addr", "Where ranks find rank 0. Default: the first host's name.", _HOSTS, "ADDRESS")]
PortOption = Annotated[int, _option("--master-port", "Rank 0's port. Default: a free one.", _HOSTS, None, (0, 65_535))]
DeadOption = Annotated[
    float, _seconds("--dead-after", "Seconds of silence after which a host counts as lost.", _HOSTS)]
ConnectOption = Annotated[
    float, _seconds("--connect-timeout", "How long the first connection to a host may take.", _HOSTS)]
ExportOption = Annotated[
    Repeatable, _option("--export", "Send this environment variable too. Repeatable.", _HOSTS, "NAME")]
# fmt: on


@dataclass(frozen=True)
class HostOptions:
    """The options for reaching hosts, which both commands take."""

    hostfile: Path
    ssh_command: str
    python: str
    master_addr: str
    master_port: int
    dead_after: float
    connect_timeout: float
    export: tuple[str, ...]

    def hosts(self) -> tuple[Host, ...]:
        """The hosts of the hostfile. Raises ConfigError when it cannot be used."""
        from kdscale.jobs.launch import launcher_errors
        from kdscale_launch import read_hostfile

        with launcher_errors():
            return read_hostfile(self.hostfile)

    def job(self, request: LaunchRequest, hosts: Sequence[Host], **settings: float | int) -> HostsJob:
        """The request as a job on these hosts; `settings` are HostsJob's."""
        from kdscale.jobs.launch import hosts_job, launcher_errors, python_path
        from kdscale_launch import SshSettings

        with launcher_errors():
            ssh = SshSettings(
                python=self.python, cwd=str(Path.cwd()), pythonpath=python_path(),
                program=tuple(shlex.split(self.ssh_command)), dead_after=self.dead_after,
                connect_seconds=self.connect_timeout,
            )  # fmt: skip
            return hosts_job(
                request, hosts, ssh, self.export, master_addr=self.master_addr, master_port=self.master_port, **settings
            )


def preflight_command(
    config: ConfigArgument,
    hostfile: HostfileOption = None,
    set_: SetOption = None,
    ssh_command: SshOption = "ssh",
    python: PythonOption = sys.executable,
    master_addr: AddressOption = "",
    master_port: PortOption = 0,
    dead_after: DeadOption = 15.0,
    connect_timeout: ConnectOption = 30.0,
    export: ExportOption = None,
) -> None:
    """Check whether the hosts can run the config together. Exit code 1 when something is in the way."""
    if hostfile is None:
        raise ConfigError("kdscale preflight", expected="--hostfile FILE", got="none")
    options = HostOptions(
        hostfile, ssh_command, python, master_addr, master_port, dead_after, connect_timeout, tuple(export or ())
    )
    hosts = options.hosts()
    request = _request(config, set_, sum(host.slots for host in hosts), accept_changes=False)
    if not _preflight(options.job(request, hosts), request):
        raise typer.Exit(1)


def launch_command(
    config: ConfigArgument,
    set_: SetOption = None,
    accept_changes: AcceptOption = False,
    until: Annotated[str, _option("--until", f"The last stage: {', '.join(_STAGES)}.", None, "STAGE")] = _STAGES[-1],
    dry_run: Annotated[bool, _option("--dry-run", "Print exactly what would run, and run nothing.")] = False,
    max_restarts: Annotated[
        int, _option("--max-restarts", "How often a broken job goes on from its last checkpoint.", between=_FROM_0)
    ] = 3,
    grace: Annotated[
        float, _seconds("--grace", "How long ranks may take to save after SIGTERM.")] = GRACE_SECONDS,
    skip_preflight: Annotated[bool, _option("--skip-preflight", "Do not check the hosts first.")] = False,
    prepare: Annotated[
        bool, _option("--prepare", "Tokenise and prune in a job of one node, for which the job of all nodes waits.")
    ] = False,
    hostfile: HostfileOption = None,
    launcher: Annotated[
        Launcher, _option("--launcher", "Our own agents over ssh, or DeepSpeed's runner.", _HOSTS)] = Launcher.ssh,
    ssh_command: SshOption = "ssh",
    python: PythonOption = sys.executable,
    master_addr: AddressOption = "",
    master_port: PortOption = 0,
    dead_after: DeadOption = 15.0,
    connect_timeout: ConnectOption = 30.0,
    host_timeout: Annotated[
        float, _seconds("--host-timeout", "How long a restart waits for a lost host to come back.", _HOSTS)
    ] = 300.0,
    min_nodes: Annotated[
        int | None,
        _option("--min-nodes", "Go on with as few hosts as this when others do not come back.", _HOSTS, None, _FROM_1),
    ] = None,
    export: ExportOption = None,
    slurm: Annotated[bool, _option("--slurm", "Write a batch script and submit it with sbatch.", _SYSTEMS)] = False,
    kubernetes: Annotated[
        bool, _option("--kubernetes", "Make an indexed Job and apply it with kubectl.", _SYSTEMS)] = False,
    pytorchjob: Annotated[
        bool, _option("--pytorchjob", "With --kubernetes: a Kubeflow PyTorchJob instead.", _SYSTEMS)] = False,
    torchrun: Annotated[
        bool, _option("--torchrun", "Run this node's ranks under torchrun; same command on every node.", _SYSTEMS)
    ] = False,
    nodes: Annotated[int, _option("--nodes", "Number of nodes.", _SYSTEMS, None, _FROM_1)] = 1,
    slots: Annotated[int, _option("--slots", "Ranks per node.", _SYSTEMS, None, _FROM_1)] = 1,
    time_limit: Annotated[str, _option("--time", "Slurm's time limit.", _SYSTEMS, "D-HH:MM:SS")] = "",
    sbatch: Annotated[
        Repeatable, _option("--sbatch", "Another sbatch option, e.g. partition=gpu. Repeatable.", _SYSTEMS)] = None,
    image: Annotated[str, _option("--image", "The container image.", _SYSTEMS)] = "",
    namespace: Annotated[str, _option("--namespace", "The Kubernetes namespace.", _SYSTEMS)] = "default",
    volume: Annotated[
        Repeatable, _option("--volume", "Mount a volume claim. Repeatable.", _SYSTEMS, "CLAIM:/PATH")] = None,
    secret: Annotated[
        Repeatable, _option("--secret", "A Secret whose keys become variables. Repeatable.", _SYSTEMS)] = None,
    gpus: Annotated[int, _option("--gpus", "GPUs per pod.", _SYSTEMS, None, _FROM_0)] = 0,
) -> None:  # fmt: skip
    """Run every stage, with the distillation spread over several machines; resumes, restarts, and ends as one job.

    Give one of --hostfile, --slurm, --kubernetes and --torchrun. The run folder must be on storage that all machines
    share. Exit code 75: stopped by SIGTERM with everything saved.
    """
    ways = {"--hostfile": hostfile is not None, "--slurm": slurm, "--kubernetes": kubernetes, "--torchrun": torchrun}
    if sum(ways.values()) != 1:
        given = ", ".join(name for name, is_given in ways.items() if is_given) or "none"
        raise ConfigError("kdscale launch", expected=f"one of {', '.join(ways)}", got=given)
    if prepare and torchrun:
        raise ConfigError("--prepare", expected="another launcher: torchrun starts on every node at once",
                          hint="run kdscale prune CONFIG on one node, then this command without --prepare")  # fmt: skip
    from kdscale.cli import launch_systems as systems

    exported = tuple(export or ())
    if hostfile is not None:
        options = HostOptions(
            hostfile, ssh_command, python, master_addr, master_port, dead_after, connect_timeout, exported
        )
        hosts = options.hosts()
        _check_min_nodes(min_nodes, len(hosts), elastic=launcher is Launcher.ssh)
        request = _request(config, set_, sum(host.slots for host in hosts), accept_changes, until)
        job = options.job(request, hosts, grace_seconds=grace, max_restarts=max_restarts, host_seconds=host_timeout)
        job = _with_fewer_hosts(job, request, min_nodes, python)
        if not dry_run and not skip_preflight and not _preflight(job, request):
            raise typer.Exit(1)
        if prepare:
            first = _prepared(request, hosts[0].slots)
            alone = options.job(
                first, (replace(hosts[0], slots=1),), grace_seconds=grace, max_restarts=max_restarts,
                host_seconds=host_timeout,
            )  # fmt: skip
            if code := _run_on_hosts(first, alone, dry_run):
                raise typer.Exit(code)
        else:
            _note_waiting(request, len(hosts), hosts[0].slots)
        if launcher is Launcher.deepspeed:
            raise typer.Exit(systems.run_deepspeed(request, job, hostfile, shlex.split(ssh_command)[1:], dry_run))
        raise typer.Exit(_run_on_hosts(request, job, dry_run))
    _check_min_nodes(min_nodes, nodes, elastic=False)
    request = _request(config, set_, nodes * slots, accept_changes, until)
    job_options = systems.JobOptions(request, python, nodes, slots, max_restarts, exported, dry_run)
    before = replace(job_options, request=_prepared(request, slots), nodes=1, slots=1) if prepare else None
    if before is None:
        _note_waiting(request, nodes, slots)
    if slurm:
        settings = systems.SlurmOptions(time_limit, math.ceil(grace), tuple(sbatch or ()), not skip_preflight)
        raise typer.Exit(systems.submit_slurm(job_options, settings, before))
    if kubernetes:
        pods = systems.PodOptions(image, namespace, tuple(volume or ()), tuple(secret or ()), gpus, grace, pytorchjob)
        raise typer.Exit(systems.apply_kubernetes(job_options, pods, master_port or 29500, before))
    raise typer.Exit(
        systems.run_torchrun(job_options, f"{master_addr or 'localhost'}:{master_port or 29400}", math.ceil(grace))
    )


def _prepared(request: LaunchRequest, slots: int) -> LaunchRequest:
    from kdscale.jobs.prepare import prepare_request

    return prepare_request(request, slots)


def _note_waiting(request: LaunchRequest, nodes: int, slots: int) -> None:
    """Say how long the other nodes' GPUs would wait for the first one."""
    from kdscale.jobs.prepare import waiting_note

    if (note := waiting_note(request.config, nodes, slots)) is not None:
        print(f"note: {note}", file=sys.stderr)


def _with_fewer_hosts(job: HostsJob, request: LaunchRequest, min_nodes: int | None, python: str) -> HostsJob:
    """The job with the commands for fewer hosts, all of which are checked now."""
    from kdscale.jobs.launch import commands_for_fewer_hosts

    if min_nodes is None:
        return job
    return replace(job, fewer_hosts=commands_for_fewer_hosts(request, job.hosts, min_nodes, python))


def _check_min_nodes(min_nodes: int | None, nodes: int, elastic: bool) -> None:
    """Raise ConfigError for an impossible --min-nodes; job systems and DeepSpeed's runner start a fixed number."""
    if min_nodes is not None and not (1 if elastic else nodes) <= min_nodes <= nodes:
        raise ConfigError(
            f"--min-nodes {min_nodes}",
            expected=f"1 to {nodes}, the number of hosts" if elastic else f"{nodes}, the number of nodes",
            hint=None if elastic else "fewer nodes need --hostfile and our own agents (--launcher ssh)",
        )


def _request(
    config: str, overrides: Sequence[str] | None, ranks: int, accept_changes: bool, until: str = _STAGES[-1]
) -> LaunchRequest:
    from kdscale.config.load import find_config
    from kdscale.jobs.launch import make_request

    return make_request(find_config(config), overrides or (), ranks, accept_changes, until)


def _preflight(job: HostsJob, request: LaunchRequest) -> bool:
    """Show what the hosts report; returns whether the job can start. Raises Interrupted on a signal."""
    from kdscale.cli import tables
    from kdscale.errors import Interrupted
    from kdscale.jobs.launch import run_preflight
    from kdscale_launch import collect_signals

    with collect_signals() as received_signals:
        findings = run_preflight(job, request, received_signals)
    if received_signals:
        raise Interrupted(received_signals[0])
    tables.findings("Preflight", findings)
    return all(finding.severity != "bad" for finding in findings)


def _run_on_hosts(request: LaunchRequest, job: HostsJob, dry_run: bool) -> int:
    """Run the job and show its results, or with `dry_run` only describe it; returns the exit code."""
    from kdscale.cli import tables
    from kdscale.jobs.launch import describe_job, run_job
    from kdscale_launch import STOPPED_EXIT_CODE, collect_signals

    if dry_run:
        print(describe_job(job))
        return 0

    def report(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def output(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with collect_signals() as received_signals:
        code = run_job(job, received_signals, report, output)
    if code == STOPPED_EXIT_CODE:
        report("stopped with everything saved; run the same command again to go on")
    folder = Path(request.config.run_dir)
    if code == 0 and folder.exists():  # the launching machine need not see the shared storage
        tables.results(folder, request.until)
    return code
