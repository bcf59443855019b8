"""Runs on machines that are reached by ssh: `kdscale launch --hostfile` on this machine, under a local supervisor.

The service may end while it goes on; it dies with its supervisor, and the ranks on the hosts die with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from kdscale.errors import ConfigError
from kdscale.jobs.launch import launcher_errors
from kdscale.service.engines.engine import Job
from kdscale.service.engines.local import LocalEngine
from kdscale.service.engines.ranks import rank_request
from kdscale.service.engines.targets import HostsTarget, read_settings, read_target
from kdscale_launch.hosts.hostfile import read_hostfile, total_slots


class HostsEngine(LocalEngine):
    """One launcher for each attempt, on this machine; a handle is the path of the attempt's folder."""

    name = "hosts"

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self.settings = read_settings("hosts", getattr(settings, "engines", None) or {})

    def _command(self, job: Job) -> list[str]:
        """See LocalEngine. Raises ConfigError for hosts that cannot run the config together."""
        target: HostsTarget = read_target({"engine": "hosts", **(job.target or {})}, self.settings)
        if not target.hostfile:
            raise ConfigError("target.hostfile", expected="a file of hosts, one `name slots=N` per line", got="none",
                              hint="an admin names one under engines.hosts in serve.yaml")  # fmt: skip
        path = Path(target.hostfile).absolute()
        with launcher_errors("target.hostfile"):
            ranks = total_slots(read_hostfile(path))
        request = rank_request(job, ranks)
        overrides = [item for item in request.overrides if not item.startswith("distill.processes=")]
        own = self.settings
        options = {
            "--hostfile": path, "--python": own.python, "--ssh-command": own.ssh_command,
            "--dead-after": f"{own.dead_after:g}", "--connect-timeout": f"{own.connect_seconds:g}",
            "--host-timeout": f"{own.host_seconds:g}", "--max-restarts": own.restarts,
            **({"--master-addr": own.master_addr} if own.master_addr else {}),
            **({"--min-nodes": target.min_nodes} if target.min_nodes else {}),
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (name, str(value))]
        words += [word for name in own.export for word in ("--export", name)]
        words += [word for item in overrides for word in ("--set", item)]
        return [*_agent(), sys.executable, "-m", "kdscale.cli.main", "launch", request.file, *words]


def _agent() -> list[str]:
    """The address of the ssh agent, which the supervisor's environment lacks: its name looks like that of a secret."""
    agent = os.environ.get("SSH_AUTH_SOCK")
    return ["env", f"SSH_AUTH_SOCK={agent}"] if agent else []
