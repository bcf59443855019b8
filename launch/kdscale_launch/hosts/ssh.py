"""How a host is reached: one ssh process with an agent at its other end."""

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

from kdscale_launch.hosts.hostfile import Host
from kdscale_launch.hosts.messages import LineBuffer, Message, decode, encode
from kdscale_launch.job import LaunchError


@dataclass(frozen=True)
class SshSettings:
    """How hosts are reached and how long silence may last."""

    python: str
    cwd: str
    pythonpath: str = ""
    ssh: tuple[str, ...] = ("ssh",)
    dead_after: float = 15.0  # seconds without a sign of life after which a host counts as lost
    connect_seconds: float = 30.0

    def command(self, host: Host) -> list[str]:
        """What is executed here to get an agent there. The remote shell sees one quoted string, and no secret."""
        alive = max(1, int(self.dead_after / 3))
        options = {
            "BatchMode": "yes", "ConnectTimeout": "10", "ServerAliveInterval": str(alive), "ServerAliveCountMax": "3",
        }  # fmt: skip
        flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        path = ["env", f"PYTHONPATH={self.pythonpath}"] if self.pythonpath else []
        agent = shlex.join([*path, self.python, "-m", "kdscale_launch.hosts.agent"])
        return [*self.ssh, *flags, "-T", host.name, f"cd {shlex.quote(self.cwd)} && exec {agent}"]


class AgentConnection:
    """One ssh process with an agent at its other end."""

    def __init__(
        self, index: int, host: Host, command: Sequence[str], events: queue.Queue[tuple[AgentConnection, Message]]
    ):
        self.index, self.host = index, host
        self.heard = time.monotonic()
        self._sending = threading.Lock()
        self.stderr: deque[str] = deque(maxlen=20)
        try:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"cannot start {command[0]!r}: {error.strerror}") from error
        self._events = events
        self._complaints = threading.Thread(target=self._read_err, daemon=True)
        self._complaints.start()
        threading.Thread(target=self._read_out, daemon=True).start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        lines = LineBuffer()
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            for line in lines.feed(data):
                if message := decode(line):
                    self._events.put((self, message))
        self._complaints.join(1.0)  # ssh says why on stderr
        self._events.put((self, {"say": "closed", "why": self.complaint()}))

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line.decode("utf-8", "replace").rstrip())

    def complaint(self) -> str:
        return "; ".join(line for line in self.stderr if line)[-600:] or "the connection ended without a message"

    def send(self, message: Message) -> None:
        assert self.process.stdin is not None
        # ValueError: closed by us. Of a connection that ended its reader tells.
        with self._sending, suppress(OSError, ValueError):
            self.process.stdin.write(encode(message))
            self.process.stdin.flush()

    def hang_up(self) -> None:
        """The agent's stdin closes: it ends its ranks and leaves."""
        assert self.process.stdin is not None
        with self._sending, suppress(OSError):  # what could not be flushed is for nobody
            self.process.stdin.close()

    def close(self, until: float) -> None:
        """Hang up, and give ssh until then (monotonic) to leave by itself."""
        self.hang_up()
        try:
            self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
