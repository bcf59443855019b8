"""Ctrl-C and SIGTERM: save what is finished, leave. A second signal ends the process without that.

The same signal within two seconds counts as the first one: a job system signals every process of a job, and the
launcher passes the signal on once more.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kdscale.errors import Interrupted

_SAME_SIGNAL_SECONDS = 2.0


class _Echoes:
    """Tells a signal from the same one again at once."""

    def __init__(self) -> None:
        self._last = (0, 0.0)

    def again(self, signum: int) -> bool:
        """Whether `signum` is the last signal once more; it is the last one from now on otherwise."""
        now = time.monotonic()
        if signum == self._last[0] and now - self._last[1] <= _SAME_SIGNAL_SECONDS:
            return True
        self._last = (signum, now)
        return False


class StopRequest:
    """Whether the process was asked to stop: `signum` is 0 until a signal arrives."""

    def __init__(self) -> None:
        self.signum = 0


@contextmanager
def watch_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a flag while the block runs. Outside the main thread no signal is caught.

    Raises Interrupted with `kept` false on a second signal, wherever the code is.
    """
    request = StopRequest()
    previous: dict[int, Any] = {}
    echoes = _Echoes()

    def note(signum: int, frame: FrameType | None) -> None:
        if echoes.again(signum):
            return
        if not request.signum:
            request.signum = signum
        else:
            for caught, handler in previous.items():
                signal.signal(caught, handler)
            raise Interrupted(signum, "again, before everything was saved", kept=False)

    if threading.current_thread() is threading.main_thread():
        previous.update({caught: signal.signal(caught, note) for caught in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield request
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)


def raise_interrupted() -> Callable[[int, object], None]:
    """A handler that raises Interrupted; the same signal at once again must not disturb the way out of the first."""
    echoes = _Echoes()

    def stop(number: int, _frame: object) -> None:
        if not echoes.again(number):
            raise Interrupted(number)

    return stop


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise Interrupted on SIGINT and SIGTERM, wherever the code is, so that temporary folders are removed."""
    stop = raise_interrupted()
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
