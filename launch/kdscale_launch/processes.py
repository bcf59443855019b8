"""Processes that start in groups of their own and are ended by group: never by name, never anybody else's."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdscale_launch.job import CannotStart

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05
_TAIL_BYTES = 8000

Process = subprocess.Popen[bytes]


def start_process(command: Sequence[str], env: Mapping[str, str], cwd: Path | str | None, output: Any) -> Process:
    """Start `command` in its own process group, such that it dies with this process, however that ends.

    `output` takes stdout and stderr (None: this process's own). Raises CannotStart.
    """
    linux = sys.platform.startswith("linux")
    watch = [] if linux else [sys.executable, "-m", "kdscale_launch.parent_watch", str(os.getpid())]
    try:
        return subprocess.Popen(
            [*watch, *command],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            preexec_fn=_die_with(os.getpid()) if linux else None,  # noqa: PLW1509
        )
    except OSError as error:
        raise CannotStart(command[0], error, cwd) from error


def _die_with(parent: int) -> Callable[[], None]:
    """Ask the kernel to kill this child when its parent dies, however that happens.

    SIGKILL rather than SIGTERM: a rank that lived on to save would meet the next run in the same folder, and every file
    is safe to leave at any instant.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: little is safe after it

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the request for stacks, until the command has a handler for it
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    return ask


def signal_groups(processes: Sequence[Process], signum: int) -> None:
    """Send a signal to each live process's whole group: its own children (data workers, compilers) get it too."""
    for process in processes:
        if process.poll() is None:
            with suppress(ProcessLookupError):  # it ended between the two calls
                os.killpg(process.pid, signum)


def request_stacks(processes: Sequence[Process]) -> None:
    """Send SIGUSR1 to each live process, not to its group: its children may not expect that signal."""
    for process in processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGUSR1)


def is_stopped(pid: int) -> bool:
    """Whether a process, or any descendant of it, was stopped by a signal (on Linux; elsewhere False)."""
    parents: dict[int, int] = {}
    stopped: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended between the two calls
            state, parent = entry.read_text().rsplit(")", 1)[1].split()[:2]
            parents[int(entry.parent.name)] = int(parent)
            stopped |= {int(entry.parent.name)} if state in "Tt" else set()
    for process in stopped:
        ancestor = process
        while ancestor in parents:
            if ancestor == pid:
                return True
            ancestor = parents[ancestor]
    return False


def end_groups(processes: Sequence[Process], grace_seconds: float) -> None:
    """SIGTERM, `grace_seconds` to leave, then SIGKILL; returns when all processes are gone."""
    if grace_seconds > 0:
        signal_groups(processes, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    signal_groups(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def tail(path: Path, limit: int = _TAIL_BYTES) -> str:
    """The last `limit` bytes of a log file as text; empty when there is no file."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - limit))
            return stream.read().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
