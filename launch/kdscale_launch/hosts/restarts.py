"""A job on several hosts, started again from its last checkpoint when something breaks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kdscale_launch.hosts.connections import HostConnections, Task
from kdscale_launch.hosts.failure import Failure, Outcome
from kdscale_launch.hosts.hostfile import Host, check_host_name, total_slots
from kdscale_launch.hosts.ssh import SshSettings
from kdscale_launch.job import GRACE_SECONDS, STOPPED_EXIT_CODE, LaunchError

_FENCE_MARGIN_SECONDS = 3.0
_ABSENT_SECONDS = 10.0  # how long a restart looks for a host that was already absent at the last one


@dataclass(frozen=True)
class HostsJob:
    """One command per rank on several hosts. `log_dir` gets a folder for each attempt with a file for each rank.

    With `fewer_hosts` (a rank's command, by a smaller number of hosts), the job goes on with that many when the other
    hosts do not come back within `host_seconds`, and with all of them again at the first restart that reaches them.
    """

    hosts: tuple[Host, ...]
    command: tuple[str, ...]
    ssh: SshSettings
    log_dir: str
    env: Mapping[str, str] = field(default_factory=dict)
    master_addr: str = ""  # default: the first host's name
    master_port: int = 0  # 0: a free one, chosen on the first host at each attempt
    grace_seconds: float = GRACE_SECONDS
    max_restarts: int = 0
    host_seconds: float = 300.0  # how long a restart waits for a host to come back
    final_codes: frozenset[int] = frozenset()  # exit codes that another attempt would not change
    fewer_hosts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.master_addr:
            check_host_name("--master-addr", self.master_addr)

    @property
    def first_address(self) -> str:
        """Where ranks find rank 0 while the first host takes part."""
        return self.master_addr or self.hosts[0].address


class JobFailed(LaunchError):  # noqa: N818 - says what happened
    """The job ended with an error that restarts may not or cannot repair."""

    def __init__(self, message: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(message)


def run_hosts(
    job: HostsJob, received_signals: Sequence[int], report: Callable[[str], None], output: Callable[[str], None]
) -> int:
    """Run to the end; returns 0, 75 after a SIGTERM on which all ranks saved, or 128 + the signal that stopped it.

    `received_signals` is the list of `collect_signals`; `report` gets messages about the job, `output` what rank 0
    prints. Raises JobFailed with the first failing rank's error, and CannotStart when there is no ssh.
    """
    return _HostsRun(job, received_signals, report, output).run()


@dataclass
class _HostsRun:
    """See `run_hosts`. `absent` holds the hosts that the last attempt went on without, and why."""

    job: HostsJob
    received_signals: Sequence[int]
    report: Callable[[str], None]
    output: Callable[[str], None]
    absent: dict[int, str] = field(default_factory=dict)

    def run(self) -> int:
        restarts = self.job.max_restarts
        for attempt in range(restarts + 1):
            last = attempt == restarts
            outcome, lost_since = self._attempt(attempt)
            if self.received_signals:
                return self._code_after_signal(outcome, self.received_signals[0])
            if outcome.ok:
                return 0
            first = outcome.first()
            if last and outcome.stopped_from_elsewhere:
                return STOPPED_EXIT_CODE
            if last or first.exit_code in self.job.final_codes:
                tries = f" (attempt {attempt + 1} of {restarts + 1})" if restarts else ""
                raise JobFailed(f"the job failed{tries}\n{outcome.describe()}", max(first.exit_code, 1))
            self.report(f"the job broke\n{outcome.describe()}")
            self._wait_for_lost_ranks(lost_since)
            self.report(f"starting again from the last checkpoint: restart {attempt + 1} of {restarts}")
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, attempt: int) -> tuple[Outcome, float | None]:
        """One attempt's outcome, and when the last host that was lost was last heard (None: none was lost)."""
        job, absent = self.job, self.absent
        ssh = replace(job.ssh, connect_seconds=job.host_seconds) if attempt else job.ssh
        with HostConnections(job.hosts, ssh, self.received_signals) as connections:
            unreachable = connections.connect({index: min(_ABSENT_SECONDS, ssh.connect_seconds) for index in absent})
            if self.received_signals:
                return Outcome(job.hosts, signum=self.received_signals[0]), None
            command = self._fit_to_reached_hosts(connections, unreachable) if unreachable else job.command
            if absent and not unreachable:
                self.report(f"all {len(job.hosts)} hosts are back")
            self.absent = absent = unreachable
            port = job.master_port or connections.free_port()
            if port is None:
                outcome = Outcome(job.hosts, failures=[Failure(0, None, "does not answer", "", time.monotonic())])
                return outcome, connections.last_heard.get(0)
            task = Task(
                command=command,
                env=job.env,
                log_dir=f"{job.log_dir}/{datetime.now(UTC):%Y%m%dT%H%M%S}-{attempt}",
                # rank 0 has moved when the first host is absent
                master_addr=connections.hosts[0].address if 0 in absent else job.first_address,
                master_port=port,
                grace_seconds=job.grace_seconds,
            )
            outcome = connections.run(task, self.output)
            return outcome, max((connections.last_heard[index] for index in connections.lost), default=None)

    def _fit_to_reached_hosts(self, connections: HostConnections, unreachable: Mapping[int, str]) -> tuple[str, ...]:
        """The command for the largest possible number of the reached hosts. Raises JobFailed when there is none."""
        hosts, commands = self.job.hosts, self.job.fewer_hosts
        listed = "\n".join(f"  - {hosts[index].name}: {reason}" for index, reason in unreachable.items())
        reached = [index for index in range(len(hosts)) if index not in unreachable]
        count = max((number for number in commands if number <= len(reached)), default=0)
        if not count:
            raise JobFailed(f"hosts that cannot be reached after {connections.ssh.connect_seconds:g} s:\n{listed}", 1)
        connections.keep_only(reached[:count])
        ranks = total_slots(connections.hosts)
        self.report(f"going on with {count} of {len(hosts)} hosts ({ranks} ranks), without\n{listed}")
        return commands[count]

    def _code_after_signal(self, outcome: Outcome, signum: int) -> int:
        if signum == signal.SIGTERM and outcome.everything_saved:
            return STOPPED_EXIT_CODE
        stopped = (0, STOPPED_EXIT_CODE, 128 + signum)
        late = {rank: code for rank, code in outcome.exit_codes.items() if code not in stopped}
        if late or outcome.failures:
            problem = f"not every rank stopped in time with its state saved (exit codes {late})"
            self.report(f"{problem}; the last checkpoint counts")
        return 128 + signum

    def _wait_for_lost_ranks(self, lost_since: float | None) -> None:
        """Wait until a lost host's agent has certainly killed its ranks: two jobs must never write one run folder."""
        if lost_since is None:
            return
        until = lost_since + self.job.ssh.dead_after + _FENCE_MARGIN_SECONDS
        if until > time.monotonic():
            self.report(f"waiting {until - time.monotonic():.0f} s for the lost host's agent to end its ranks")
        while time.monotonic() < until and not self.received_signals:
            time.sleep(0.2)
