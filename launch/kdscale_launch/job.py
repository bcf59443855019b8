"""What a job is, and how it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class JobSpec:
    """One command, run once a rank under RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    `env` is added to this process's environment. Rank 0 shares this process's terminal; what the other ranks print goes
    to `log_dir`/rank-N.log. `grace_seconds` is how long ranks may take to leave after a signal before they are killed.
    """

    command: tuple[str, ...]
    processes: int
    log_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    grace_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.command:
            raise LaunchError("a job needs a command")
        if self.processes < 1:
            raise LaunchError(f"a job needs at least one process, got {self.processes}")


class LaunchError(RuntimeError):
    """A job that could not be started."""


class RankFailed(LaunchError):  # noqa: N818 - says what happened
    """The first rank that ended with an error; `exit_code` is what the whole job should leave with."""

    def __init__(self, rank: int, exit_code: int, log_tail: str):
        self.rank, self.exit_code, self.log_tail = rank, exit_code, log_tail
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"left with exit code {exit_code}"
        shown = f"; the end of what it said:\n{log_tail}" if log_tail else ""
        super().__init__(f"rank {rank} {how}{shown}")
