"""What a job is, and how it can fail."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HUNG_EXIT_CODE = 9  # the rank's own watchdog ended it
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: stopped by SIGTERM with everything saved; the same command goes on
GRACE_SECONDS = 120.0  # how long ranks may take to save, where nobody says otherwise


class LaunchError(RuntimeError):
    """A job that cannot be run as it was asked for."""


class CannotStart(LaunchError):  # noqa: N818 - says what happened
    """A program that is missing or cannot be executed."""

    def __init__(self, program: str, error: OSError, folder: Path | str | None = None):
        where = f" in {folder}" if folder is not None else ""
        super().__init__(f"cannot start {program!r}{where}: {error.strerror}")


class RankFailed(LaunchError):  # noqa: N818 - says what happened
    """The rank that ended with an error first; the whole job should leave with its `exit_code`."""

    def __init__(self, rank: int, exit_code: int, log_tail: str):
        self.rank, self.exit_code, self.log_tail = rank, exit_code, log_tail
        shown = f"; the end of its log:\n{log_tail}" if log_tail else ""
        super().__init__(f"rank {rank} {describe_exit(exit_code)}{shown}")


@dataclass(frozen=True)
class RankPlace:
    """Which ranks of a job over several machines run on this one, and where they meet the others."""

    first_rank: int
    world_size: int
    master_addr: str
    master_port: int
    first_local_rank: int = 0
    local_world_size: int | None = None  # None: as many as JobSpec.processes


@dataclass(frozen=True)
class JobSpec:
    """One command, run once per rank under RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    `env` is added to this process's environment. The first rank prints to this process's terminal, the others to
    `log_dir`/rank-N.log. After a signal, ranks have `grace_seconds` to leave before they are killed; by default as long
    as they need: whatever started this process has a limit of its own, which kills the ranks too, and none below it may
    be shorter. Without a `place` all ranks of the job run on this machine. Raises LaunchError for an empty command or
    no processes.
    """

    command: tuple[str, ...]
    processes: int
    log_dir: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    grace_seconds: float = math.inf
    place: RankPlace | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise LaunchError("a job needs a command")
        if self.processes < 1:
            raise LaunchError(f"a job needs at least one process, got {self.processes}")

    @property
    def first_rank(self) -> int:
        """The global rank of this machine's first process."""
        return self.place.first_rank if self.place else 0


def everything_saved(exit_codes: Iterable[int | None]) -> bool:
    """After SIGTERM: every rank stopped with its progress saved, had ended well, or had not begun yet.

    While a rank has something to lose it catches the signal: one that dies of it was still being loaded.
    """
    return all(code in (0, STOPPED_EXIT_CODE, -signal.SIGTERM) for code in exit_codes)


def describe_exit(exit_code: int) -> str:
    """`left with exit code 1`, `was killed by signal 9` (a negative code), or that the watchdog ended it."""
    if exit_code == HUNG_EXIT_CODE:
        return f"hung: its watchdog ended it (exit code {exit_code})"
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"left with exit code {exit_code}"


def shell_exit_code(returncode: int) -> int:
    """A `subprocess` return code as a shell reports it: 128 + n for a process that signal n killed."""
    return returncode if returncode >= 0 else 128 - returncode
