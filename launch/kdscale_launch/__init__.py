"""Start the ranks of a job, watch them, and make sure that all of them end. Standard library only."""

from kdscale_launch.hosts.connections import HostConnections, Task, collect_signals
from kdscale_launch.hosts.failure import Failure, Outcome
from kdscale_launch.hosts.hostfile import Host, parse_hostfile, read_hostfile, total_slots
from kdscale_launch.hosts.restarts import HostsJob, JobFailed, run_hosts
from kdscale_launch.hosts.ssh import SshSettings
from kdscale_launch.job import HUNG_EXIT_CODE, STOPPED_EXIT_CODE, JobSpec, LaunchError, RankFailed, RankPlace
from kdscale_launch.local import run_local

__all__ = [
    "HUNG_EXIT_CODE",
    "STOPPED_EXIT_CODE",
    "Failure",
    "Host",
    "HostConnections",
    "HostsJob",
    "JobFailed",
    "JobSpec",
    "LaunchError",
    "Outcome",
    "RankFailed",
    "RankPlace",
    "SshSettings",
    "Task",
    "collect_signals",
    "parse_hostfile",
    "read_hostfile",
    "run_hosts",
    "run_local",
    "total_slots",
]
