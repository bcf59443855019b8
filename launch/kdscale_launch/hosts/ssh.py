"""How the launcher reaches a host: one ssh process with an agent at its other end."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from kdscale_launch.environment import check_text
from kdscale_launch.hosts.hostfile import Host
from kdscale_launch.hosts.messages import LineBuffer, Message, decode, encode
from kdscale_launch.job import CannotStart


@dataclass(frozen=True)
class SshSettings:
    """How hosts are reached, and how long they may be silent. `python` and `cwd` are paths on the hosts.

    Raises LaunchError for control characters, which not every remote shell can quote.
    """

    python: str
    cwd: str
    pythonpath: str = ""
    program: tuple[str, ...] = ("ssh",)
    dead_after: float = 15.0  # seconds without a sign of life after which a host counts as lost
    connect_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_text("what the remote shell gets", self.python, self.cwd, self.pythonpath, *self.program)

    def command(self, host: Host) -> list[str]:
        """The local command that starts an agent on `host`. The remote shell gets one quoted string and no secret."""
        alive = max(1, int(self.dead_after / 3))
        options = {
            "BatchMode": "yes", "ConnectTimeout": "10", "ServerAliveInterval": str(alive), "ServerAliveCountMax": "3",
        }  # fmt: skip
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        path = ["env", f"PYTHONPATH={self.pythonpath}"] if self.pythonpath else []
        agent = shlex.join([*path, self.python, "-m", "kdscale_launch.hosts.agent"])
        return [*self.program, *flags, "-T", host.name, f"cd {shlex.quote(self.cwd)} && exec {agent}"]


class AgentConnection:
    """One ssh process; puts (itself, report) into `reports` until the connection ends. Raises CannotStart."""

    def __init__(
        self, index: int, host: Host, command: Sequence[str], reports: queue.Queue[tuple[AgentConnection, Message]]
    ):
        self.index, self.host = index, host
        self.last_heard = time.monotonic()
        self._send_lock = threading.Lock()
        self._stderr: deque[str] = deque(maxlen=20)
        try:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise CannotStart(command[0], error) from error
        self._reports = reports
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()
        threading.Thread(target=self._read_reports, daemon=True).start()

    def _read_reports(self) -> None:
        assert self.process.stdout is not None
        lines = LineBuffer()
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            for line in lines.feed(data):
                if message := decode(line):
                    self._reports.put((self, message))
        self._stderr_reader.join(1.0)  # ssh prints the reason on stderr
        reason = "; ".join(line for line in self._stderr if line)[-600:] or "the connection ended without a message"
        self._reports.put((self, {"report": "closed", "reason": reason}))

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._stderr.append(line.decode("utf-8", "replace").rstrip())

    def send(self, order: Message) -> None:
        """Send an order. A connection that has ended is reported by its reader, not here."""
        assert self.process.stdin is not None
        with self._send_lock, suppress(OSError, ValueError):  # ValueError: this side has closed it
            self.process.stdin.write(encode(order))
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """Close the agent's stdin, on which it ends its ranks and leaves."""
        assert self.process.stdin is not None
        with self._send_lock, suppress(OSError):  # nobody needs what could not be flushed
            self.process.stdin.close()

    def close(self, deadline: float) -> None:
        """Hang up, and kill ssh if it has not left by `deadline` (on time.monotonic's clock)."""
        self.hang_up()
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
