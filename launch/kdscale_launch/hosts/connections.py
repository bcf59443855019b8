"""The launcher's side: an agent on every host over ssh, and one command run on all of them."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

from kdscale_launch.hosts.failure import Failure, Outcome
from kdscale_launch.hosts.hostfile import Host, first_ranks, total_slots
from kdscale_launch.hosts.messages import Message
from kdscale_launch.hosts.ssh import AgentConnection, SshSettings
from kdscale_launch.local import SAME_SIGNAL_SECONDS

_TURN_SECONDS = 0.2


_BEATS_A_DEADLINE = 4


_SETTLE_SECONDS = 1.5  # how long to wait after the first failure for the one that caused it


_HUNG_SETTLE_SECONDS = 5.0  # watchdogs of ranks that wait for each other end within their rounds, not at once


_STACKS_SECONDS = 1.0


_RETRY_SECONDS = 2.0


_CLOSE_SECONDS = 2.0


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


class HostConnections:
    """Agents on all hosts. Use as a context manager: leaving it ends whatever still runs there."""

    def __init__(self, hosts: Sequence[Host], reach: SshSettings, received: Sequence[int] = ()):
        self.hosts, self.reach = tuple(hosts), reach
        self._received = received  # signals that came; filled by the handler of `collect_signals`
        self._events: queue.Queue[tuple[AgentConnection, Message]] = queue.Queue()
        self._remotes: dict[int, AgentConnection] = {}
        self.lost: dict[int, str] = {}
        self.last_heard: dict[int, float] = {}
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> HostConnections:
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._beating.join()
        _close(list(self._remotes.values()))

    def connect(self, patience: Mapping[int, float] | None = None) -> dict[int, str]:
        """Agents on all hosts, tried again until `connect_seconds` are over; by host index, why not.

        `patience` is another number of seconds for some hosts, by index.
        """
        seconds = dict.fromkeys(range(len(self.hosts)), self.reach.connect_seconds) | dict(patience or {})
        deadline = {index: time.monotonic() + limit for index, limit in seconds.items()}
        waiting = dict.fromkeys(range(len(self.hosts)), 0.0)  # host → when to try (again)
        ready: set[int] = set()
        trying: dict[int, AgentConnection] = {}
        why: dict[int, str] = {}
        while not self._received and any(
            index not in ready and time.monotonic() < until for index, until in deadline.items()
        ):
            for index in [i for i, at in waiting.items() if at <= time.monotonic()]:
                del waiting[index]
                trying[index] = AgentConnection(
                    index, self.hosts[index], self.reach.command(self.hosts[index]), self._events
                )
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
                    _close([trying.pop(remote.index)])
                    waiting[remote.index] = time.monotonic() + _RETRY_SECONDS
        _close(list(trying.values()))
        return {index: why.get(index, "no answer") for index in range(len(self.hosts)) if index not in ready}

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these hosts alone, numbered anew in this order; the agents of the others leave."""
        kept = [self._remotes[index] for index in indices]
        _close([remote for remote in self._remotes.values() if remote not in kept])
        self.hosts = tuple(self.hosts[index] for index in indices)
        for number, remote in enumerate(kept):
            remote.index = number
        self._remotes = dict(enumerate(kept))
        self.last_heard.clear()

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

    def free_port(self) -> int | None:
        """A port that is free on the first host; None when it does not answer."""
        self._remotes[0].send({"do": "port"})
        for _, message in self._answers("port", {0}):
            return int(message["port"])
        return None

    def run(self, task: Task, output: Callable[[str], None] = lambda text: None) -> Outcome:
        """Run on all hosts to the end. After the first failure, a lost host, or the deadline, all ranks are ended.

        A signal that came is passed on once; ranks then have `grace` seconds to save before they are killed.
        """
        outcome = Outcome(self.hosts, log_dir=task.log_dir)
        running = set(self._remotes) - set(self.lost)
        for index, why in self.lost.items():
            outcome.failures.append(Failure(index, None, f"lost: {why}", "", time.monotonic()))
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
                end_at = min(end_at, now + (_HUNG_SETTLE_SECONDS if outcome.failures[0].hung else _SETTLE_SECONDS))
            if now >= end_at and not forwarded and not outcome.asked and outcome.wants_stacks:
                self._tell(running, {"do": "stacks"})
                outcome.asked = True
                end_at = now + _STACKS_SECONDS
            elif now >= end_at and give_up == float("inf"):
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
                # a rank on its way out has no handler any more for the request for stacks: no failure of its own
                asked = outcome.asked and message["code"] == -signal.SIGUSR1
                if message["code"] and not asked and not self._received and not outcome.ending:
                    outcome.failures.append(Failure(index, message["rank"], "", message["tail"], now, message["code"]))
            case "stopped" if not outcome.ending:
                why = "stopped by a signal, it makes no progress"
                outcome.failures.append(Failure(index, message["rank"], why, "", now))
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

    def _turn(self) -> list[tuple[AgentConnection, Message]]:
        """Wait a moment for reports, and add a `lost` report for hosts that fell silent or closed."""
        out: list[tuple[AgentConnection, Message]] = []
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
            if now - remote.heard > self.reach.dead_after:
                out.append((remote, self._lose(remote, f"no sign of life for {self.reach.dead_after:g} s")))
        return out

    def _beat(self) -> None:
        """In a thread: a terminal that does not take rank 0's output must not look like a launcher that is gone."""
        while not self._over.wait(self.reach.dead_after / _BEATS_A_DEADLINE):
            for remote in list(self._remotes.values()):
                remote.send({"do": "beat"})

    def _lose(self, remote: AgentConnection, why: str) -> Message:
        self.lost[remote.index] = why
        return {"say": "lost", "why": why}


def _close(remotes: Sequence[AgentConnection]) -> None:
    """All at once: dead links must not add up."""
    for remote in remotes:
        remote.hang_up()
    until = time.monotonic() + _CLOSE_SECONDS
    for remote in remotes:
        remote.close(until)


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are only noted, in this list; whoever waits looks at it. Main thread only.

    The same one within two seconds counts once: job systems signal a job's processes and their parents.
    """
    received: list[int] = []
    last = [0.0]

    def note(signum: int, frame: FrameType | None) -> None:
        if not received or signum != received[-1] or time.monotonic() - last[0] > SAME_SIGNAL_SECONDS:
            received.append(signum)
            last[0] = time.monotonic()

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
