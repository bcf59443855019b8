"""Finds and ends all processes of one attempt by a mark in their environment, which children inherit.

A run's ranks have sessions of their own, so neither a process group nor a parent leads to all of them. Linux only:
elsewhere no process is found, and the ways in which a run ends its own children must do.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MARK = "KDSCALE_ATTEMPT"
_POLL_SECONDS = 0.02


def marked(mark: str) -> list[int]:
    """The processes of this user that carry the mark."""
    return [pid for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*")) if _carries(pid, mark)]


def kill_marked(mark: str) -> int:
    """SIGKILL to every process that carries the mark; returns how many there were."""
    found = marked(mark)
    for pid in found:
        with suppress(ProcessLookupError):  # it ended by itself
            handle = os.pidfd_open(pid)
            try:
                if _carries(pid, mark):  # the number may have become another process's; the handle stays with this one
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)
    return len(found)


def end_marked(mark: str, seconds: float = 10.0) -> bool:
    """Kill until none is left, or `seconds` have passed; returns whether none is left."""
    deadline = time.monotonic() + seconds
    while kill_marked(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _carries(pid: int, mark: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # somebody else's, or it has ended
        return False
    return f"{MARK}={mark}".encode() in environment.split(b"\0")
