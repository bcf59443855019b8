"""The launcher's side: an agent on every host over ssh, and one command run on all of them."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from kdscale_launch.failure import Failure, Outcome
from kdscale_launch.hostfile import Host, first_ranks, total_slots
from kdscale_launch.job import LaunchError
from kdscale_launch.wire import Lines, Message, decode, encode

_TURN_SECONDS = 0.2
_BEATS_A_DEADLINE = 4
_SETTLE_SECONDS = 1.5  # how long to wait after the first failure for the one that caused it
_RETRY_SECONDS = 2.0
SSH = ("ssh",)


@dataclass(frozen=True)
class Reach:
    """How hosts are reached and how long silence may last."""

    python: str
    cwd: str
    pythonpath: str = ""
    ssh: tuple[str, ...] = SSH
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
        agent = shlex.join([*path, self.python, "-m", "kdscale_launch.agent"])
        return [*self.ssh, *flags, "-T", host.name, f"cd {shlex.quote(self.cwd)} && exec {agent}"]


@dataclass(frozen=True)
class Task:
    """A command for all hosts: once a slot with torch's environment (`ranks`), or once a host."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ranks: bool = True
    log_dir: str | None = None
    cwd: str | None = None
    master_addr: str = ""
    master_port: int = 0
    grace: float = 60.0
    deadline: float = float("inf")  # seconds


class Remote:
    """One ssh process with an agent at its other end."""

    def __init__(self, index: int, host: Host, command: Sequence[str], events: queue.Queue[tuple[Remote, Message]]):
        self.index, self.host = index, host
        self.heard = self.sent = time.monotonic()
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
        lines = Lines()
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
        self.sent = time.monotonic()
        try:
            self.process.stdin.write(encode(message))
            self.process.stdin.flush()
        except OSError:
            return  # its reader reports that the connection ended

    def close(self) -> None:
        """The agent's stdin closes: it ends its ranks and leaves; ssh gets a moment for that."""
        assert self.process.stdin is not None
        with suppress(OSError):  # what could not be flushed is for nobody
            self.process.stdin.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Cluster:
    """Agents on all hosts. Use as a context manager: leaving it ends whatever still runs there."""

    def __init__(self, hosts: Sequence[Host], reach: Reach, received: Sequence[int] = ()):
        self.hosts, self.reach = tuple(hosts), reach
        self._received = received  # signals that came; filled by the handler of `signals_noted`
        self._events: queue.Queue[tuple[Remote, Message]] = queue.Queue()
        self._remotes: dict[int, Remote] = {}
        self.lost: dict[int, str] = {}
        self.last_heard: dict[int, float] = {}

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for remote in self._remotes.values():
            remote.close()

    def connect(self) -> dict[int, str]:
        """Agents on all hosts, tried again until `connect_seconds` are over; by host index, why not."""
        deadline = time.monotonic() + self.reach.connect_seconds
        waiting = dict.fromkeys(range(len(self.hosts)), 0.0)  # host → when to try (again)
        ready: set[int] = set()
        trying: dict[int, Remote] = {}
        why: dict[int, str] = {}
        while len(ready) < len(self.hosts) and time.monotonic() < deadline and not self._received:
            for index in [i for i, at in waiting.items() if at <= time.monotonic()]:
                del waiting[index]
                trying[index] = Remote(index, self.hosts[index], self.reach.command(self.hosts[index]), self._events)
                trying[index].send({"do": "hello", "dead_after": self.reach.dead_after})
                why.setdefault(index, "no answer")
            for remote, message in self._turn():
                if trying.get(remote.index) is not remote:
                    continue
                if message["say"] == "hello":
                    ready.add(remote.index)
                    self._remotes[remote.index] = trying.pop(remote.index)
                elif message["say"] == "closed":
                    why[remote.index] = message["why"]
                    trying.pop(remote.index).close()
                    waiting[remote.index] = time.monotonic() + _RETRY_SECONDS
        for remote in trying.values():
            remote.close()
        return {index: why.get(index, "no answer") for index in range(len(self.hosts)) if index not in ready}

    def clock_skews(self, pings: int = 5) -> dict[int, tuple[float, float]]:
        """Seconds by which each host's clock is ahead of this one's, and the uncertainty: half the best round trip."""
        best: dict[int, tuple[float, float]] = {}
        for number in range(pings):
            began = {index: (time.time(), time.monotonic()) for index in self._remotes}
            for remote in self._remotes.values():
                remote.send({"do": "ping", "id": number})
            for index, message in self._answers("pong"):
                trip = time.monotonic() - began[index][1]
                skew = message["time"] - (began[index][0] + trip / 2)
                if index not in best or trip / 2 < best[index][1]:
                    best[index] = (skew, trip / 2)
        return best

    def free_port(self) -> int:
        """A port that is free on the first host. Raises LaunchError when it does not answer."""
        self._remotes[0].send({"do": "port"})
        for _, message in self._answers("port", {0}):
            return int(message["port"])
        raise LaunchError(f"{self.hosts[0].name} does not answer: {self.lost.get(0, 'no word in time')}")

    def run(self, task: Task, output: Callable[[str], None] = lambda text: None) -> Outcome:
        """Run on all hosts to the end. After the first failure, a lost host, or the deadline, all ranks are ended.

        A signal that came is passed on once; ranks then have `grace` seconds to save before they are killed.
        """
        outcome = Outcome(self.hosts)
        running = set(self._remotes) - set(self.lost)
        for index, order in enumerate(self._orders(task)):
            if index in running:
                self._remotes[index].send(order)
        started, end_at, forwarded = time.monotonic(), float("inf"), 0
        give_up = float("inf")
        while running and time.monotonic() < give_up:
            for remote, message in self._turn():
                self._note(outcome, running, remote.index, message, output)
            now = time.monotonic()
            if now - started > task.deadline and end_at == float("inf"):
                outcome.failures.append(Failure(None, None, f"not done within {task.deadline:g} s", "", now))
                end_at = now
            if len(self._received) > forwarded:
                hard = forwarded > 0
                forwarded = len(self._received)
                self._tell(running, {"do": "signal", "signum": signal.SIGKILL if hard else self._received[0]})
                end_at = min(end_at, now + (0.0 if hard else task.grace))
            elif outcome.failures and not forwarded:
                end_at = min(end_at, now + _SETTLE_SECONDS)
            if now >= end_at and give_up == float("inf"):
                # Peers of a lost rank hang in a collective, where no Python signal handler runs: they get little time.
                grace = 0.0 if forwarded else min(task.grace, 5.0)
                self._tell(running, {"do": "end", "grace": grace})
                outcome.ending = True
                give_up = now + grace + 10.0
        for index in running:
            outcome.failures.append(Failure(index, None, "did not confirm that its ranks ended", "", time.monotonic()))
        outcome.signum = self._received[0] if forwarded else 0
        return outcome

    def _orders(self, task: Task) -> Iterator[Message]:
        world = total_slots(self.hosts)
        for index, (host, first) in enumerate(zip(self.hosts, first_ranks(self.hosts), strict=True)):
            ranks: list[Any] = [{"rank": first, "env": {"KDSCALE_HOST_INDEX": str(index)}}]
            shared = dict(task.env)
            if task.ranks:
                shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(host.slots)}
                shared |= {"MASTER_ADDR": task.master_addr, "MASTER_PORT": str(task.master_port)}
                ranks = [
                    {"rank": first + local, "env": {"RANK": str(first + local), "LOCAL_RANK": str(local)}}
                    for local in range(host.slots)
                ]
            yield {
                "do": "run", "command": list(task.command), "env": shared, "ranks": ranks, "log_dir": task.log_dir,
                "cwd": task.cwd or self.reach.cwd, "follow": [0] if task.ranks and first == 0 else [],
            }  # fmt: skip

    def _note(
        self, outcome: Outcome, running: set[int], index: int, message: Message, output: Callable[[str], None]
    ) -> None:
        now = time.monotonic()
        match message["say"]:
            case "output":
                output(message["text"])
            case "exit":
                outcome.said[message["rank"]] = message["tail"]
                outcome.codes[message["rank"]] = message["code"]
                if message["code"] and not self._received and not outcome.ending:
                    outcome.failures.append(Failure(index, message["rank"], "", message["tail"], now, message["code"]))
            case "done":
                running.discard(index)
            case "refused":
                outcome.failures.append(Failure(index, None, message["why"], "", now))
                running.discard(index)
            case "lost" if index in running:
                outcome.failures.append(Failure(index, None, f"lost: {message['why']}", "", now))
                running.discard(index)

    def _tell(self, indices: set[int], message: Message) -> None:
        for index in indices:
            self._remotes[index].send(message)

    def _answers(self, kind: str, asked: set[int] | None = None) -> Iterator[tuple[int, Message]]:
        """One answer of this kind from each host that is asked, until `dead_after` seconds are over."""
        missing = (set(self._remotes) if asked is None else set(asked)) - set(self.lost)
        deadline = time.monotonic() + self.reach.dead_after
        while missing - set(self.lost) and time.monotonic() < deadline:
            for remote, message in self._turn():
                if message["say"] == kind and remote.index in missing:
                    missing.discard(remote.index)
                    yield remote.index, message

    def _turn(self) -> list[tuple[Remote, Message]]:
        """Wait a moment for reports, send beats, and add a `lost` report for hosts that fell silent or closed."""
        out: list[tuple[Remote, Message]] = []
        try:
            out.append(self._events.get(timeout=_TURN_SECONDS))
            while True:
                out.append(self._events.get_nowait())
        except queue.Empty:
            pass  # all that came has been taken
        now = time.monotonic()
        for remote, message in list(out):
            remote.heard = now
            if message["say"] == "closed" and self._remotes.get(remote.index) is remote:
                out.append((remote, self._lose(remote, f"the connection ended ({message['why']})")))
        for index, remote in self._remotes.items():
            self.last_heard[index] = remote.heard
            if index in self.lost:
                continue
            if now - remote.sent > self.reach.dead_after / _BEATS_A_DEADLINE:
                remote.send({"do": "beat"})
            if now - remote.heard > self.reach.dead_after:
                out.append((remote, self._lose(remote, f"no sign of life for {self.reach.dead_after:g} s")))
        return out

    def _lose(self, remote: Remote, why: str) -> Message:
        self.lost[remote.index] = why
        return {"say": "lost", "why": why}


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are only noted, in this list; whoever waits looks at it. Main thread only."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
