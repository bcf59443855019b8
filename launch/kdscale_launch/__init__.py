"""Start the ranks of a job and see to it that all of them end. Standard library only."""

from kdscale_launch.hosts.cluster import Cluster, Task, signals_noted
from kdscale_launch.hosts.failure import Failure, Outcome
from kdscale_launch.hosts.hostfile import Host, parse_hostfile, read_hostfile, total_slots
from kdscale_launch.hosts.restarts import HostsJob, JobFailed, run_hosts
from kdscale_launch.hosts.ssh import Reach
from kdscale_launch.job import HUNG_EXIT_CODE, STOPPED_EXIT_CODE, JobSpec, LaunchError, Place, RankFailed
from kdscale_launch.local import run_local

__all__ = [
    "HUNG_EXIT_CODE",
    "STOPPED_EXIT_CODE",
    "Cluster",
    "Failure",
    "Host",
    "HostsJob",
    "JobFailed",
    "JobSpec",
    "LaunchError",
    "Outcome",
    "Place",
    "RankFailed",
    "Reach",
    "Task",
    "parse_hostfile",
    "read_hostfile",
    "run_hosts",
    "run_local",
    "signals_noted",
    "total_slots",
]
