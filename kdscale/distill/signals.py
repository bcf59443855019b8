"""Ctrl-C and SIGTERM: finish the step, save, leave. The second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """`signum` is 0 until a signal came."""

    def __init__(self) -> None:
        self.signum = 0


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a flag for the length of the block. Outside the main thread nothing is caught."""
    request = StopRequest()
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        for caught, handler in previous.items():
            signal.signal(caught, handler)

    if threading.current_thread() is threading.main_thread():
        previous.update({caught: signal.signal(caught, note) for caught in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield request
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
