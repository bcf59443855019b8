"""One scheduler a home folder: whoever holds the lock of a file in it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kdscale.files import explain_os_errors
from kdscale.runtime.locks import try_lock


class Leader:
    """Holds or waits for a lock that the system lets go of when the process ends, however it ends."""

    def __init__(self, path: Path):
        self._path, self._handle, self._turn = path, -1, threading.Lock()

    def leads(self) -> bool:
        """Whether this process is the one, from now on until `resign`; tries to become it if it is not."""
        with self._turn:  # two threads of this process would keep each other from it
            if self._handle >= 0:
                return True
            with explain_os_errors(self._path):
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if not try_lock(handle):
                os.close(handle)
                return False
            self._handle = handle
            return True

    def resign(self) -> None:
        """Let another process lead."""
        with self._turn:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
