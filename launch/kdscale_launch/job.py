"""What a job is, and how it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HUNG_EXIT_CODE = 9  # ended by its own watchdog
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by SIGTERM with everything saved; the same command goes on


@dataclass(frozen=True)
class RankPlace:
    """Where this machine's ranks stand in a job that spans several machines."""

    first_rank: int
    world_size: int
    master_addr: str
    master_port: int
    first_local_rank: int = 0
    local_world_size: int | None = None  # None: the ranks of this JobSpec are all there are on this machine


@dataclass(frozen=True)
class JobSpec:
    """One command, run once a rank under RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    `env` is added to this process's environment. The first rank shares this process's terminal; what the others print
    goes to `log_dir`/rank-N.log. `grace_seconds` is how long ranks may take to leave after a signal before they are
    killed. Without a `place` the job is this machine's alone.
    """

    command: tuple[str, ...]
    processes: int
    log_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    grace_seconds: float = 60.0
    place: RankPlace | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise LaunchError("a job needs a command")
        if self.processes < 1:
            raise LaunchError(f"a job needs at least one process, got {self.processes}")

    @property
    def first_rank(self) -> int:
        return self.place.first_rank if self.place else 0


class LaunchError(RuntimeError):
    """A job that could not be started."""


class RankFailed(LaunchError):  # noqa: N818 - says what happened
    """The first rank that ended with an error; `exit_code` is what the whole job should leave with."""

    def __init__(self, rank: int, exit_code: int, log_tail: str):
        self.rank, self.exit_code, self.log_tail = rank, exit_code, log_tail
        shown = f"; the end of what it said:\n{log_tail}" if log_tail else ""
        super().__init__(f"rank {rank} {describe_exit(exit_code)}{shown}")


def describe_exit(exit_code: int) -> str:
    if exit_code == HUNG_EXIT_CODE:
        return f"hung: its watchdog ended it (exit code {exit_code})"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"left with exit code {exit_code}"
