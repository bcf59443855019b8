"""`kdscale launch` and `kdscale preflight`: a run on several hosts, or rendered for a job system."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from kdscale.jobs.launch import LaunchRequest
    from kdscale_launch import Host, HostsJob

_HOSTS, _SYSTEMS = "Hosts over ssh", "Job systems"


class Launcher(StrEnum):
    ssh = "ssh"
    deepspeed = "deepspeed"


def _option(names: str, text: str, panel: str, metavar: str | None = None) -> object:
    return typer.Option(*names.split(), help=text, rich_help_panel=panel, metavar=metavar)


HostfileOption = Annotated[
    Path | None, _option("--hostfile -H", "Hosts in DeepSpeed's format: `name slots=N` a line.", _HOSTS, "FILE")
]
LauncherOption = Annotated[Launcher, _option("--launcher", "Our own agents over ssh, or DeepSpeed's runner.", _HOSTS)]
SshOption = Annotated[str, _option("--ssh-command", "What to call instead of ssh, with its options.", _HOSTS)]
PythonOption = Annotated[str, _option("--python", "The interpreter on the hosts.", _HOSTS, "PATH")]
AddressOption = Annotated[
    str, _option("--master-addr", "Where ranks find rank 0. Default: the first host's name.", _HOSTS, "ADDRESS")
]
PortOption = Annotated[int, _option("--master-port", "Rank 0's port. Default: one that is free there.", _HOSTS)]
DeadOption = Annotated[
    float, _option("--dead-after", "Seconds of silence after which a host counts as lost.", _HOSTS, "SECONDS")
]
ConnectOption = Annotated[
    float, _option("--connect-timeout", "How long the first connection to a host may take.", _HOSTS, "SECONDS")
]
ExportOption = Annotated[
    list[str] | None, _option("--export", "Send this environment variable too. Repeatable.", _HOSTS, "NAME")
]


@dataclass(frozen=True)
class HostOptions:
    """Everything about reaching hosts that both commands take."""

    hostfile: Path
    ssh_command: str
    python: str
    master_addr: str
    master_port: int
    dead_after: float
    connect_timeout: float
    export: tuple[str, ...]


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
    """Check on every host whether the config can run there together. Exit code 1 when something is in the way."""
    if hostfile is None:
        raise ConfigError("kdscale preflight", expected="--hostfile FILE")
    options = HostOptions(
        hostfile, ssh_command, python, master_addr, master_port, dead_after, connect_timeout, tuple(export or ())
    )
    hosts = _hosts(hostfile)
    asked = _request(config, set_, sum(host.slots for host in hosts), accept=False)
    if not _preflight(_job(asked, hosts, options), asked):
        raise typer.Exit(1)


def launch_command(
    config: ConfigArgument,
    set_: SetOption = None,
    accept_changes: AcceptOption = False,
    until: Annotated[
        str, typer.Option("--until", metavar="STAGE", help="Stop after distill, eval or report.")
    ] = "report",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run; run nothing.")] = False,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="How often a broken job starts again from its last checkpoint.")
    ] = 3,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", help="How long ranks may take to save after SIGTERM.")
    ] = 120.0,
    skip_preflight: Annotated[bool, typer.Option("--skip-preflight", help="Do not check the hosts first.")] = False,
    hostfile: HostfileOption = None,
    launcher: LauncherOption = Launcher.ssh,
    ssh_command: SshOption = "ssh",
    python: PythonOption = sys.executable,
    master_addr: AddressOption = "",
    master_port: PortOption = 0,
    dead_after: DeadOption = 15.0,
    connect_timeout: ConnectOption = 30.0,
    host_timeout: Annotated[
        float,
        _option(
            "--host-timeout --node-timeout",
            "How long a restart waits for a lost host to come back.",
            _HOSTS,
            "SECONDS",
        ),
    ] = 300.0,
    min_nodes: Annotated[
        int | None,
        _option("--min-nodes", "Go on with as few hosts as this when others do not come back.", _HOSTS),
    ] = None,
    export: ExportOption = None,
    slurm: Annotated[bool, _option("--slurm", "Render a batch script and submit it with sbatch.", _SYSTEMS)] = False,
    kubernetes: Annotated[
        bool, _option("--kubernetes", "Render an indexed Job and apply it with kubectl.", _SYSTEMS)
    ] = False,
    pytorchjob: Annotated[
        bool, _option("--pytorchjob", "With --kubernetes: a Kubeflow PyTorchJob instead.", _SYSTEMS)
    ] = False,
    torchrun: Annotated[
        bool, _option("--torchrun", "Run this node's share under torchrun; the same command on every node.", _SYSTEMS)
    ] = False,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="How many nodes.", rich_help_panel=_SYSTEMS)] = 1,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Ranks a node.", rich_help_panel=_SYSTEMS)] = 1,
    time_limit: Annotated[str, _option("--time", "Slurm's time limit.", _SYSTEMS, "D-HH:MM:SS")] = "",
    sbatch: Annotated[
        list[str] | None, _option("--sbatch", "Another sbatch option, e.g. partition=gpu. Repeatable.", _SYSTEMS)
    ] = None,
    image: Annotated[str, _option("--image", "The container image.", _SYSTEMS)] = "",
    namespace: Annotated[str, _option("--namespace", "The Kubernetes namespace.", _SYSTEMS)] = "default",
    volume: Annotated[
        list[str] | None, _option("--volume", "Mount a volume claim. Repeatable.", _SYSTEMS, "CLAIM:/PATH")
    ] = None,
    secret: Annotated[
        list[str] | None, _option("--secret", "A Secret whose keys become variables. Repeatable.", _SYSTEMS)
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs a pod.", rich_help_panel=_SYSTEMS)] = 0,
) -> None:
    """Run every stage with the distillation spread over several machines; resumes, restarts, and ends as one.

    Give one of --hostfile, --slurm, --kubernetes and --torchrun. The run folder must be on storage that all machines
    share. Exit code 75: stopped by SIGTERM with everything saved.
    """
    ways = {"--hostfile": hostfile is not None, "--slurm": slurm, "--kubernetes": kubernetes, "--torchrun": torchrun}
    if sum(ways.values()) != 1:
        given = ", ".join(name for name, is_given in ways.items() if is_given) or "none"
        raise ConfigError("kdscale launch", expected=f"one of {', '.join(ways)}", got=given)
    from kdscale.cli import launch_systems as systems

    exported = tuple(export or ())
    if hostfile is not None:
        options = HostOptions(
            hostfile, ssh_command, python, master_addr, master_port, dead_after, connect_timeout, exported
        )
        hosts = _hosts(hostfile)
        _check_min_nodes(min_nodes, len(hosts), elastic=launcher is Launcher.ssh)
        asked = _request(config, set_, sum(host.slots for host in hosts), accept_changes, until)
        job = _job(asked, hosts, options, grace=grace, max_restarts=max_restarts, host_seconds=host_timeout)
        job = _elastic(job, asked, min_nodes, python)
        if not dry_run and not skip_preflight and not _preflight(job, asked):
            raise typer.Exit(1)
        if launcher is Launcher.deepspeed:
            _leave(systems.run_deepspeed(asked, job, hostfile, shlex.split(ssh_command)[1:], dry_run))
        _on_hosts(asked, job, dry_run)
        return
    _check_min_nodes(min_nodes, nodes, elastic=False)
    asked = _request(config, set_, nodes * slots, accept_changes, until)
    common = systems.Common(asked, python, nodes, slots, max_restarts, exported, dry_run)
    if slurm:
        _leave(systems.submit_slurm(common, time_limit, int(grace), tuple(sbatch or ()), check=not skip_preflight))
    if kubernetes:
        pods = systems.PodOptions(image, namespace, tuple(volume or ()), tuple(secret or ()), gpus, grace, pytorchjob)
        _leave(systems.apply_kubernetes(common, pods, master_port or 29500))
    _leave(systems.run_torchrun(common, f"{master_addr or 'localhost'}:{master_port or 29400}"))


def _elastic(job: HostsJob, asked: LaunchRequest, min_nodes: int | None, python: str) -> HostsJob:
    """The job with the commands for fewer hosts, all of them checked now."""
    from kdscale.jobs.launch import commands_for_fewer_hosts

    return (
        job
        if min_nodes is None
        else replace(job, smaller=commands_for_fewer_hosts(asked, job.hosts, min_nodes, python))
    )


def _leave(code: int) -> None:
    raise typer.Exit(code)


def _check_min_nodes(min_nodes: int | None, nodes: int, elastic: bool) -> None:
    """Job systems and DeepSpeed's runner start a fixed number of nodes."""
    if min_nodes is not None and not (1 if elastic else nodes) <= min_nodes <= nodes:
        raise ConfigError(
            f"--min-nodes {min_nodes}",
            expected=f"1 to {nodes}, the number of hosts" if elastic else f"{nodes}, the number of nodes",
            hint=None if elastic else "fewer nodes need --hostfile and our own agents (--launcher ssh)",
        )


def _hosts(hostfile: Path) -> tuple[Host, ...]:
    from kdscale_launch import LaunchError, read_hostfile

    try:
        return read_hostfile(hostfile)
    except LaunchError as error:
        raise ConfigError(str(error)) from error


def _request(
    config: str, overrides: Sequence[str] | None, ranks: int, accept: bool, until: str = "report"
) -> LaunchRequest:
    from kdscale.config.load import find_config
    from kdscale.jobs.launch import request

    return request(find_config(config), overrides or (), ranks, accept, until)


def _job(asked: LaunchRequest, hosts: Sequence[Host], options: HostOptions, **settings: float | int) -> HostsJob:
    from kdscale.jobs.launch import hosts_job, python_path
    from kdscale_launch import SshSettings

    reach = SshSettings(
        python=options.python,
        cwd=str(Path.cwd()),
        pythonpath=python_path(),
        ssh=tuple(shlex.split(options.ssh_command)),
        dead_after=options.dead_after,
        connect_seconds=options.connect_timeout,
    )
    return hosts_job(
        asked, hosts, reach, options.export, master_addr=options.master_addr, master_port=options.master_port,
        **settings,
    )  # fmt: skip


def _preflight(job: HostsJob, asked: LaunchRequest) -> bool:
    """Show what every host says; whether the job can start."""
    from kdscale.cli import tables
    from kdscale.errors import Interrupted
    from kdscale.jobs.launch import run_preflight
    from kdscale_launch import collect_signals

    with collect_signals() as received:
        found = run_preflight(job, asked, received)
    if received:
        raise Interrupted(received[0])
    tables.preflight(found)
    return all(finding.severity != "bad" for finding in found)


def _on_hosts(asked: LaunchRequest, job: HostsJob, dry_run: bool) -> None:
    from kdscale.cli import tables
    from kdscale.jobs.launch import describe, run
    from kdscale_launch import STOPPED_EXIT_CODE, collect_signals

    if dry_run:
        print(describe(job))
        return

    def output(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with collect_signals() as received:
        code = run(job, received, lambda text: print(text, file=sys.stderr, flush=True), output)
    if code == STOPPED_EXIT_CODE:
        print("stopped with everything saved; run the same command again to go on", file=sys.stderr)
    folder = Path(asked.config.run_dir)
    if code == 0 and folder.exists():  # the launcher itself need not see the shared storage
        tables.results(folder, asked.until)
    _leave(code)
