"""Locks of files, which the system lets go of when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LOOK_SECONDS = 0.5  # how long a look at a lock may take on a busy machine
_POLL_SECONDS = 0.01


def try_lock(handle: int, patience: float = 0.0) -> bool:
    """Lock an open file or folder for this process; False where another one has locked it.

    `patience`: seconds to keep trying, for a file that `is_locked` may look at: it holds the lock for an instant.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Whether a process has locked this file now; False where there is no such file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # nobody who can hold it
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)
