"""The launcher's side: a connection to an agent on every host, and one command run on all of them."""

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
from kdscale_launch.hosts.messages import BEATS_PER_DEADLINE, Message
from kdscale_launch.hosts.ssh import AgentConnection, SshSettings
from kdscale_launch.job import GRACE_SECONDS
from kdscale_launch.local import SAME_SIGNAL_SECONDS, signal_handlers

_POLL_SECONDS = 0.2
_SETTLE_SECONDS = 1.5  # how long to wait after the first failure for the one that caused it
_HUNG_SETTLE_SECONDS = 5.0  # watchdogs of ranks that wait for each other end them within their rounds, not at once
_STACKS_SECONDS = 1.0
_RETRY_SECONDS = 2.0
_CLOSE_SECONDS = 2.0
_CONFIRM_SECONDS = 10.0  # how long agents may take to report that their ranks have ended
_NEVER = float("inf")


@dataclass(frozen=True)
class Task:
    """A command for all hosts: once per slot with torch's environment (`per_slot`), or once per host."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    per_slot: bool = True
    log_dir: str | None = None
    cwd: str | None = None
    master_addr: str = ""
    master_port: int = 0
    grace_seconds: float = GRACE_SECONDS
    deadline_seconds: float = _NEVER


class HostConnections:
    """Connections to agents on all hosts. A context manager: leaving it ends whatever still runs there.

    `lost` holds, by host index, why a host was lost; `last_heard` when each was last heard (time.monotonic).
    """

    def __init__(self, hosts: Sequence[Host], ssh: SshSettings, received_signals: Sequence[int] = ()):
        self.hosts, self.ssh = tuple(hosts), ssh
        self._received_signals = received_signals  # filled by the handler of `collect_signals`
        self._reports: queue.Queue[tuple[AgentConnection, Message]] = queue.Queue()
        self._agents: dict[int, AgentConnection] = {}
        self.lost: dict[int, str] = {}
        self.last_heard: dict[int, float] = {}
        self._closing = threading.Event()
        self._beat_thread = threading.Thread(target=self._send_beats, daemon=True)

    def __enter__(self) -> HostConnections:
        self._beat_thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._beat_thread.join()
        _close(list(self._agents.values()))

    def connect(self, patience: Mapping[int, float] | None = None) -> dict[int, str]:
        """Start an agent on every host, trying again for `connect_seconds`; returns why not, by host index.

        `patience` gives another number of seconds for some hosts, by index. Raises CannotStart when there is no ssh.
        """
        seconds = dict.fromkeys(range(len(self.hosts)), self.ssh.connect_seconds) | dict(patience or {})
        deadlines = {index: time.monotonic() + limit for index, limit in seconds.items()}
        next_try = dict.fromkeys(range(len(self.hosts)), 0.0)
        ready: set[int] = set()
        trying: dict[int, AgentConnection] = {}
        reasons: dict[int, str] = {}
        while not self._received_signals and any(
            index not in ready and time.monotonic() < deadline for index, deadline in deadlines.items()
        ):
            for index in [i for i, at in next_try.items() if at <= time.monotonic()]:
                del next_try[index]
                command = self.ssh.command(self.hosts[index])
                trying[index] = AgentConnection(index, self.hosts[index], command, self._reports)
                trying[index].send({"order": "hello", "dead_after": self.ssh.dead_after})
                reasons.setdefault(index, "no answer")
            for agent, message in self._wait_for_reports():
                if trying.get(agent.index) is not agent:
                    continue
                if message["report"] == "hello":
                    ready.add(agent.index)
                    self._agents[agent.index] = trying.pop(agent.index)
                elif message["report"] == "closed":
                    reasons[agent.index] = message["reason"]
                    _close([trying.pop(agent.index)])
                    next_try[agent.index] = time.monotonic() + _RETRY_SECONDS
        _close(list(trying.values()))
        return {index: reasons.get(index, "no answer") for index in range(len(self.hosts)) if index not in ready}

    def keep_only(self, indices: Sequence[int]) -> None:
        """Go on with these hosts alone, numbered anew in this order; the agents of the other hosts leave."""
        kept = [self._agents[index] for index in indices]
        _close([agent for agent in self._agents.values() if agent not in kept])
        self.hosts = tuple(self.hosts[index] for index in indices)
        for number, agent in enumerate(kept):
            agent.index = number
        self._agents = dict(enumerate(kept))
        self.last_heard.clear()

    def clock_skews(self, pings: int = 5) -> dict[int, tuple[float, float]]:
        """Seconds by which each host's clock is ahead of this one's, and the uncertainty: half the best round trip."""
        best: dict[int, tuple[float, float]] = {}
        for number in range(pings):
            began = {index: (time.time(), time.monotonic()) for index in self._agents}
            for agent in self._agents.values():
                agent.send({"order": "ping", "id": number})
            for index, message in self._answers("pong"):
                trip = time.monotonic() - began[index][1]
                skew = message["time"] - (began[index][0] + trip / 2)
                if index not in best or trip / 2 < best[index][1]:
                    best[index] = (skew, trip / 2)
        return best

    def free_port(self) -> int | None:
        """A port that is free on the first host; None when it does not answer."""
        self._agents[0].send({"order": "port"})
        for _, message in self._answers("port", {0}):
            return int(message["port"])
        return None

    def run(self, task: Task, output: Callable[[str], None] = lambda text: None) -> Outcome:
        """Run on all hosts to the end. After the first failure, a lost host, or the deadline, all ranks are ended.

        A received signal is passed on once; ranks then have `grace_seconds` to save before they are killed. `output`
        gets what rank 0 prints.
        """
        outcome = Outcome(self.hosts, log_dir=task.log_dir)
        running = set(self._agents) - set(self.lost)
        for index, reason in self.lost.items():
            outcome.failures.append(Failure(index, None, f"lost: {reason}", "", time.monotonic()))
        for index, order in enumerate(self._run_orders(task)):
            if index in running:
                self._agents[index].send(order)
        started, end_at, give_up_at, forwarded = time.monotonic(), _NEVER, _NEVER, 0
        while running and time.monotonic() < give_up_at:
            for agent, message in self._wait_for_reports():
                self._record(outcome, running, agent.index, message, output)
            now = time.monotonic()
            if now - started > task.deadline_seconds and end_at == _NEVER:
                reason = f"not done within {task.deadline_seconds:g} s"
                outcome.failures.append(Failure(None, None, reason, "", now))
                end_at = now
            if len(self._received_signals) > forwarded:
                kill = forwarded > 0
                forwarded = len(self._received_signals)
                signum = signal.SIGKILL if kill else self._received_signals[0]
                self._send(running, {"order": "signal", "signum": signum})
                end_at = min(end_at, now + (0.0 if kill else task.grace_seconds))
            elif outcome.failures and not forwarded:
                end_at = min(end_at, now + (_HUNG_SETTLE_SECONDS if outcome.failures[0].hung else _SETTLE_SECONDS))
            if now >= end_at and not forwarded and not outcome.stacks_requested and outcome.wants_stacks:
                self._send(running, {"order": "stacks"})
                outcome.stacks_requested = True
                end_at = now + _STACKS_SECONDS
            elif now >= end_at and give_up_at == _NEVER:
                # Peers of a lost rank hang in a collective, where no Python signal handler runs: they get little time.
                grace = 0.0 if forwarded else min(task.grace_seconds, 5.0)
                self._send(running, {"order": "end", "grace": grace})
                outcome.ending = True
                give_up_at = now + grace + _CONFIRM_SECONDS
        for index in running:
            outcome.failures.append(Failure(index, None, "did not confirm that its ranks ended", "", time.monotonic()))
        outcome.signum = self._received_signals[0] if forwarded else 0
        return outcome

    def _run_orders(self, task: Task) -> Iterator[Message]:
        """The `run` order for each host."""
        world = total_slots(self.hosts)
        for index, (host, first) in enumerate(zip(self.hosts, first_ranks(self.hosts), strict=True)):
            ranks: list[Any] = [{"rank": first, "env": {"KDSCALE_HOST_INDEX": str(index)}}]
            env = dict(task.env)
            if task.per_slot:
                env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(host.slots)}
                env |= {"MASTER_ADDR": task.master_addr, "MASTER_PORT": str(task.master_port)}
                ranks = [
                    {"rank": first + local, "env": {"RANK": str(first + local), "LOCAL_RANK": str(local)}}
                    for local in range(host.slots)
                ]
            yield {
                "order": "run", "command": list(task.command), "env": env, "ranks": ranks, "log_dir": task.log_dir,
                "cwd": task.cwd or self.ssh.cwd, "follow": [0] if task.per_slot and first == 0 else [],
            }  # fmt: skip

    def _record(
        self, outcome: Outcome, running: set[int], index: int, message: Message, output: Callable[[str], None]
    ) -> None:
        """Add a host's report to the outcome; a host that is done or lost leaves `running`."""
        now = time.monotonic()
        match message["report"]:
            case "output":
                output(message["text"])
            case "exit":
                rank, code, log_tail = message["rank"], message["exit_code"], message["log_tail"]
                outcome.log_tails[rank], outcome.exit_codes[rank] = log_tail, code
                # a rank that is about to leave has no handler any more for the request for stacks: not its failure
                died_of_request = outcome.stacks_requested and code == -signal.SIGUSR1
                if code and not died_of_request and not self._received_signals and not outcome.ending:
                    outcome.failures.append(Failure(index, rank, "", log_tail, now, code))
            case "stopped" if not outcome.ending:
                reason = "stopped by a signal, it makes no progress"
                outcome.failures.append(Failure(index, message["rank"], reason, "", now))
            case "done":
                running.discard(index)
            case "refused":
                outcome.failures.append(Failure(index, None, message["reason"], "", now))
                running.discard(index)
            case "lost" if index in running:
                outcome.failures.append(Failure(index, None, f"lost: {message['reason']}", "", now))
                running.discard(index)

    def _send(self, indices: set[int], order: Message) -> None:
        for index in indices:
            self._agents[index].send(order)

    def _answers(self, report: str, hosts: set[int] | None = None) -> Iterator[tuple[int, Message]]:
        """One report of this name from each of the hosts (None: all), for at most `dead_after` seconds."""
        missing = (set(self._agents) if hosts is None else set(hosts)) - set(self.lost)
        deadline = time.monotonic() + self.ssh.dead_after
        while missing - set(self.lost) and time.monotonic() < deadline:
            for agent, message in self._wait_for_reports():
                if message["report"] == report and agent.index in missing:
                    missing.discard(agent.index)
                    yield agent.index, message

    def _wait_for_reports(self) -> list[tuple[AgentConnection, Message]]:
        """Wait a moment for reports; adds a `lost` report for each host that fell silent or closed."""
        reports: list[tuple[AgentConnection, Message]] = []
        try:
            reports.append(self._reports.get(timeout=_POLL_SECONDS))
            while True:
                reports.append(self._reports.get_nowait())
        except queue.Empty:
            pass  # all reports have been taken
        now = time.monotonic()
        for agent, message in list(reports):
            agent.last_heard = now
            if message["report"] == "closed" and self._agents.get(agent.index) is agent:
                reports.append((agent, self._lose(agent, f"the connection ended ({message['reason']})")))
        for index, agent in self._agents.items():
            self.last_heard[index] = agent.last_heard
            if index not in self.lost and now - agent.last_heard > self.ssh.dead_after:
                reports.append((agent, self._lose(agent, f"no sign of life for {self.ssh.dead_after:g} s")))
        return reports

    def _send_beats(self) -> None:
        """In a thread: a terminal that does not take rank 0's output must not look like a launcher that is gone."""
        while not self._closing.wait(self.ssh.dead_after / BEATS_PER_DEADLINE):
            for agent in list(self._agents.values()):
                agent.send({"order": "beat"})

    def _lose(self, agent: AgentConnection, reason: str) -> Message:
        self.lost[agent.index] = reason
        return {"report": "lost", "reason": reason}


def _close(agents: Sequence[AgentConnection]) -> None:
    """Close all connections at once: the waits for dead links must not add up."""
    for agent in agents:
        agent.hang_up()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for agent in agents:
        agent.close(deadline)


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Within the block, SIGINT and SIGTERM only go into this list; whoever waits looks at it. Main thread only.

    The same signal within two seconds counts once: job systems signal a job's processes and their parents.
    """
    received: list[int] = []
    last = [0.0]

    def collect(signum: int, frame: FrameType | None) -> None:
        if not received or signum != received[-1] or time.monotonic() - last[0] > SAME_SIGNAL_SECONDS:
            received.append(signum)
            last[0] = time.monotonic()

    with signal_handlers({signal.SIGINT: collect, signal.SIGTERM: collect}):
        yield received
