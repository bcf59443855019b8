"""A stand-in for ssh that stays on this machine: the agents, the pipes and the processes are real."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdscale_launch import Host, HostConnections, SshSettings

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


@pytest.fixture
def ssh(tmp_path: Path, fake_ssh: Path) -> SshSettings:
    return SshSettings(
        python=sys.executable, cwd=str(tmp_path), pythonpath=str(LAUNCH), program=(str(fake_ssh),), dead_after=5.0,
        connect_seconds=20.0,
    )  # fmt: skip


@pytest.fixture
def connections(ssh: SshSettings) -> Iterator[HostConnections]:
    """Two hosts, one slot on the first and two on the second."""
    with HostConnections([Host("one", 1), Host("two", 2)], ssh) as connections:
        assert connections.connect() == {}
        yield connections


@pytest.fixture
def alive() -> Callable[[int], bool]:
    def look(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        stat = Path(f"/proc/{pid}/stat")
        return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")

    return look


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], bool]:
    def wait(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.02)  # between two looks; what is waited for is the condition
        return False

    return wait
