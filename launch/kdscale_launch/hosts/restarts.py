"""A job on several hosts: started, watched, ended, and started again from its last checkpoint when something broke."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kdscale_launch.hosts.connections import HostConnections, Task
from kdscale_launch.hosts.failure import Failure, Outcome
from kdscale_launch.hosts.hostfile import Host, total_slots
from kdscale_launch.hosts.ssh import SshSettings
from kdscale_launch.job import STOPPED_EXIT_CODE, LaunchError

_FENCE_MARGIN_SECONDS = 3.0


_AWAY_SECONDS = 10.0  # how long a restart looks for a host that was already away at the last one


@dataclass(frozen=True)
class HostsJob:
    """One command a rank on several hosts. `log_dir` gets a folder for each attempt with a file for each rank.

    With `smaller`, commands by a smaller number of hosts, the job goes on with so many when others do not come back
    within `host_seconds`, and with all of them again at the first restart that finds them.
    """

    hosts: tuple[Host, ...]
    command: tuple[str, ...]
    reach: SshSettings
    log_dir: str
    env: Mapping[str, str] = field(default_factory=dict)
    master_addr: str = ""  # default: the first host's name
    master_port: int = 0  # 0: a free one, chosen on the first host at each attempt
    grace: float = 60.0
    max_restarts: int = 0
    host_seconds: float = 300.0  # how long a restart waits for a host to come back
    final_codes: frozenset[int] = frozenset()  # exit codes that another try would not change
    smaller: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


class JobFailed(LaunchError):  # noqa: N818 - says what happened
    """The job ended with an error that no restart may or could mend."""

    def __init__(self, message: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(message)


def run_hosts(job: HostsJob, received: Sequence[int], say: Callable[[str], None], output: Callable[[str], None]) -> int:
    """Run to the end; 0, 75 after a SIGTERM that all ranks survived saved, or 128 + the signal that stopped it.

    `received` fills with signals (see `collect_signals`). Raises JobFailed with the first failing rank's error.
    """
    away: dict[int, str] = {}
    for attempt in range(job.max_restarts + 1):
        last = attempt == job.max_restarts
        outcome, quiet_since = _attempt(job, attempt, away, received, say, output)
        if received:
            return _stopped(outcome, received[0], say)
        if outcome.ok:
            return 0
        first = outcome.first()
        code = first.code if first.code > 0 else 1
        if last and outcome.stopped:
            return STOPPED_EXIT_CODE
        if last or first.code in job.final_codes:
            tries = f" (attempt {attempt + 1} of {job.max_restarts + 1})" if job.max_restarts else ""
            raise JobFailed(f"the job failed{tries}\n{outcome.describe()}", code)
        say(f"the job broke\n{outcome.describe()}")
        _fence(job, quiet_since, received, say)
        say(f"starting again from the last checkpoint: restart {attempt + 1} of {job.max_restarts}")
    raise AssertionError("the last attempt returns or raises")


def _attempt(
    job: HostsJob,
    attempt: int,
    away: dict[int, str],
    received: Sequence[int],
    say: Callable[[str], None],
    output: Callable[[str], None],
) -> tuple[Outcome, float | None]:
    """One try. Also: when the last host that was lost was last heard (None: none was lost).

    `away` holds the hosts that the attempt before went on without, and why; it is brought up to date.
    """
    reach = replace(job.reach, connect_seconds=job.host_seconds) if attempt else job.reach
    with HostConnections(job.hosts, reach, received) as cluster:
        unreachable = cluster.connect({index: min(_AWAY_SECONDS, reach.connect_seconds) for index in away})
        if received:
            return Outcome(job.hosts, signum=received[0]), None
        command = _fit(job, cluster, unreachable, say) if unreachable else job.command
        if away and not unreachable:
            say(f"all {len(job.hosts)} hosts are back")
        away.clear()
        away.update(unreachable)
        port = job.master_port or cluster.free_port()
        if port is None:
            outcome = Outcome(job.hosts, failures=[Failure(0, None, "does not answer", "", time.monotonic())])
            return outcome, cluster.last_heard.get(0)
        task = Task(
            command=command,
            env=job.env,
            log_dir=f"{job.log_dir}/{_attempt_name(attempt)}",
            # where rank 0 is has moved when the first host is away
            master_addr=cluster.hosts[0].address if 0 in away else job.master_addr or job.hosts[0].address,
            master_port=port,
            grace=job.grace,
        )
        outcome = cluster.run(task, output)
        silent = [cluster.last_heard[index] for index in cluster.lost]
        return outcome, max(silent, default=None)


def _fit(
    job: HostsJob, cluster: HostConnections, unreachable: Mapping[int, str], say: Callable[[str], None]
) -> tuple[str, ...]:
    """The command for as many of the hosts that were reached as one fits. Raises JobFailed when none does."""
    listed = "\n".join(f"  - {job.hosts[index].name}: {why}" for index, why in unreachable.items())
    reached = [index for index in range(len(job.hosts)) if index not in unreachable]
    count = max((number for number in job.smaller if number <= len(reached)), default=0)
    if not count:
        raise JobFailed(f"hosts that cannot be reached after {cluster.reach.connect_seconds:g} s:\n{listed}", 1)
    cluster.keep(reached[:count])
    say(f"going on with {count} of {len(job.hosts)} hosts ({total_slots(cluster.hosts)} ranks), without\n{listed}")
    return job.smaller[count]


def _attempt_name(attempt: int) -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{attempt}"


def _stopped(outcome: Outcome, signum: int, say: Callable[[str], None]) -> int:
    if signum == signal.SIGTERM and outcome.saved:
        return STOPPED_EXIT_CODE
    late = {rank: code for rank, code in outcome.codes.items() if code not in (0, STOPPED_EXIT_CODE, 128 + signum)}
    if late or outcome.failures:
        say(f"not every rank stopped in time with its work saved (exit codes {late}); the last checkpoint counts")
    return 128 + signum


def _fence(job: HostsJob, quiet_since: float | None, received: Sequence[int], say: Callable[[str], None]) -> None:
    """Wait until a lost host's agent has certainly killed its ranks: two jobs must never write one run folder."""
    if quiet_since is None:
        return
    until = quiet_since + job.reach.dead_after + _FENCE_MARGIN_SECONDS
    if until > time.monotonic():
        say(f"waiting {until - time.monotonic():.0f} s for the lost host's ranks to be ended by their agent")
    while time.monotonic() < until and not received:
        time.sleep(0.2)
