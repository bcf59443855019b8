"""What went wrong on which host, and which of many errors came first."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdscale_launch.hosts.hostfile import Host
from kdscale_launch.job import HUNG_EXIT_CODE, STOPPED_EXIT_CODE, describe_exit
from kdscale_launch.watchdog import MARK, WAITING

# What a healthy rank says when another one has gone: an effect, not the cause.
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
    """A rank that ended badly, or (rank None) a host that could not go on. `when` is on the launcher's own clock."""

    host: int | None
    rank: int | None
    why: str
    tail: str
    when: float
    code: int = 0

    @property
    def is_effect(self) -> bool:
        """Whether it looks like the consequence of another rank's end."""
        if self.rank is None or self.code <= 0:
            return False
        if self.hung:
            return self.hung.endswith(WAITING)
        return _EFFECT.search(last_error(self.tail)) is not None

    @property
    def hung(self) -> str:
        """What its watchdog said when it ended the rank; "" when the rank did not hang."""
        said = _HUNG.findall(self.tail)
        if self.code == HUNG_EXIT_CODE:
            return said[-1] if said else "hung"
        timed_out = self.code > 0 and not said and _FAULTHANDLER.search(self.tail)
        return "hung in code that does not release Python's lock" if timed_out else ""

    @property
    def wants_stacks(self) -> bool:
        """Whether the other ranks' stacks help to tell why: a rank hung, was killed, or its host was lost."""
        return bool(self.hung) or self.code < 0 or (self.rank is None and self.why.startswith("lost"))


@dataclass
class Outcome:
    """How a command ended on all hosts. `codes` and `said` are by rank."""

    hosts: Sequence[Host]
    codes: dict[int, int] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    signum: int = 0
    log_dir: str | None = None
    asked: bool = False  # all ranks were asked for their stacks
    ending: bool = False  # the launcher is ending the ranks: how they leave says nothing any more

    @property
    def ok(self) -> bool:
        return not self.failures and all(code == 0 for code in self.codes.values())

    @property
    def saved(self) -> bool:
        """After SIGTERM: every rank said that it stopped with its work saved, had ended well, or had not begun yet.

        A rank's first act is to catch the signal: one that dies of it was still being loaded.
        """
        fine = (0, STOPPED_EXIT_CODE, -signal.SIGTERM)
        return not self.failures and all(code in fine for code in self.codes.values())

    @property
    def stopped(self) -> bool:
        """Every failure is a rank that was told to stop from elsewhere (its machine is to go) and saved its work."""
        return bool(self.failures) and all(failure.code == STOPPED_EXIT_CODE for failure in self.failures)

    @property
    def wants_stacks(self) -> bool:
        return any(failure.wants_stacks for failure in self.failures)

    def first(self) -> Failure:
        """The failure to show first: causes before effects, then by time."""
        return min(self.failures, key=lambda failure: (failure.is_effect, failure.when))

    def describe(self) -> str:
        """The first failure with its last words, then a line for each of the others."""
        first = self.first()
        lines = [self._headline(first)]
        lines += [f"    {line}" for line in last_error(first.tail).splitlines()]
        others = sorted((f for f in self.failures if f is not first), key=lambda failure: failure.when)
        lines += ["then:"] if others else []
        lines += [f"  {self._headline(failure)}" for failure in others]
        return "\n".join(lines)

    def _headline(self, failure: Failure) -> str:
        host = "" if failure.host is None else f"host {self.hosts[failure.host].name}"
        rank = "" if failure.rank is None else f"rank {failure.rank}"
        what = failure.why or failure.hung or describe_exit(failure.code)
        if failure.hung and self.log_dir:
            what += f"; stack in {self.log_dir}/rank-{failure.rank}.log"
        return f"{', '.join(part for part in (host, rank) if part) or 'the job'}: {what}"


def last_error(tail: str) -> str:
    """The last traceback in what a rank said, else its last lines."""
    lines = tail.splitlines()
    starts = [number for number, line in enumerate(lines) if _TRACEBACK in line]
    return "\n".join(lines[starts[-1] :][-_SHOWN_LINES:] if starts else lines[-_SHOWN_LINES:])
