"""The command by which a host is reached."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace

from kdscale_launch import Host, HostConnections, Task


def test_the_remote_command_survives_two_shells(ssh, tmp_path):
    folder = tmp_path / "it's; a $(folder)"
    folder.mkdir()
    odd = replace(ssh, cwd=str(folder))
    *flags, name, remote = odd.command(Host("one", 1))
    assert name == "one"
    assert shlex.split(remote)[:2] == ["cd", str(folder)]
    assert "ServerAliveInterval=1" in flags
    with HostConnections([Host("one", 1)], odd) as connections:
        assert connections.connect() == {}
        outcome = connections.run(Task((sys.executable, "-S", "-c", "import os; print(os.getcwd())"), per_slot=False))
        assert outcome.log_tails == {0: str(folder)}
