"""What went wrong on which host, and which of many errors was the cause."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdscale_launch.hosts.hostfile import Host
from kdscale_launch.job import HUNG_EXIT_CODE, STOPPED_EXIT_CODE, describe_exit, everything_saved
from kdscale_launch.watchdog import MARK, WAITING

# What a healthy rank prints when another one is gone: an effect, not the cause.
_EFFECT = re.compile(
    r"[Cc]onnection (?:closed|reset) by peer|Broken pipe|Connection refused|remote process exited|Socket Timeout"
    r"|[Rr]ead error|Timed out waiting|DistNetworkError|NCCL.*(?:abort|remote error)|wait timeout"
)
_HUNG = re.compile(rf"^{MARK} rank \d+ (hung in .*)$", re.MULTILINE)
_FAULTHANDLER = re.compile(r"^Timeout \(\d+:\d\d:\d\d", re.MULTILINE)  # of its own C timer, which leaves with 1
_TRACEBACK = "Traceback (most recent call last)"
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Failure:
    """A rank that ended badly, or (rank None) a host that could not go on. `time` is on the launcher's own clock."""

    host: int | None
    rank: int | None
    reason: str
    log_tail: str
    time: float
    exit_code: int = 0

    @property
    def is_effect(self) -> bool:
        """Whether it looks like the consequence of another rank's end."""
        if self.rank is None or self.exit_code <= 0:
            return False
        if self.hung:
            return self.hung.endswith(WAITING)
        return _EFFECT.search(last_error(self.log_tail)) is not None

    @property
    def hung(self) -> str:
        """What its watchdog printed when it ended the rank; empty when the rank did not hang."""
        reports = _HUNG.findall(self.log_tail)
        if self.exit_code == HUNG_EXIT_CODE:
            return reports[-1] if reports else "hung"
        timed_out = self.exit_code > 0 and not reports and _FAULTHANDLER.search(self.log_tail)
        return "hung in code that does not release Python's lock" if timed_out else ""

    @property
    def wants_stacks(self) -> bool:
        """Whether the other ranks' stacks help to find the cause: a rank hung, was killed, or its host was lost."""
        return bool(self.hung) or self.exit_code < 0 or (self.rank is None and self.reason.startswith("lost"))


@dataclass
class Outcome:
    """How a command ended on all hosts. `exit_codes` and `log_tails` (the ends of their output) are by rank."""

    hosts: Sequence[Host]
    exit_codes: dict[int, int] = field(default_factory=dict)
    log_tails: dict[int, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    signum: int = 0
    log_dir: str | None = None
    stacks_requested: bool = False
    ending: bool = False  # the launcher is ending the ranks: their exit codes mean nothing any more

    @property
    def ok(self) -> bool:
        """Whether every rank ended with 0."""
        return not self.failures and all(code == 0 for code in self.exit_codes.values())

    @property
    def everything_saved(self) -> bool:
        """See `kdscale_launch.job.everything_saved`; no host was lost either."""
        return not self.failures and everything_saved(self.exit_codes.values())

    @property
    def stopped_from_elsewhere(self) -> bool:
        """Whether every failure is a rank that something else told to stop (its machine is to go) and that saved."""
        return bool(self.failures) and all(failure.exit_code == STOPPED_EXIT_CODE for failure in self.failures)

    @property
    def wants_stacks(self) -> bool:
        """Whether the ranks that still run should print their stacks before they are ended."""
        return any(failure.wants_stacks for failure in self.failures)

    def first(self) -> Failure:
        """The failure to show first: causes before effects, then by time."""
        return min(self.failures, key=lambda failure: (failure.is_effect, failure.time))

    def describe(self) -> str:
        """The first failure with the last error in its log, then one line for each of the other failures."""
        first = self.first()
        lines = [self._headline(first)]
        lines += [f"    {line}" for line in last_error(first.log_tail).splitlines()]
        later = sorted((f for f in self.failures if f is not first), key=lambda failure: failure.time)
        lines += ["then:"] if later else []
        lines += [f"  {self._headline(failure)}" for failure in later]
        return "\n".join(lines)

    def _headline(self, failure: Failure) -> str:
        """`host a, rank 3: left with exit code 1`."""
        host = "" if failure.host is None else f"host {self.hosts[failure.host].name}"
        rank = "" if failure.rank is None else f"rank {failure.rank}"
        problem = failure.reason or failure.hung or describe_exit(failure.exit_code)
        if failure.hung and self.log_dir:
            problem += f"; stack in {self.log_dir}/rank-{failure.rank}.log"
        return f"{', '.join(name for name in (host, rank) if name) or 'the job'}: {problem}"


def last_error(log_tail: str) -> str:
    """The last traceback in the end of a log, or its last lines; at most _SHOWN_LINES lines."""
    lines = log_tail.splitlines()
    starts = [number for number, line in enumerate(lines) if _TRACEBACK in line]
    return "\n".join(lines[starts[-1] :][-_SHOWN_LINES:] if starts else lines[-_SHOWN_LINES:])
