"""What ranks agree on while they train: to stop because one of them was told to, when a checkpoint is due or written.

A step can take many minutes, and a job system gives two to save in. So the question is put before every micro-batch,
without keeping a device waiting: the sum over the ranks is started there, on the CPU, and read before the next one. All
ranks read the same sum at the same place, and so leave at the same micro-batch.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from kdscale.runtime.ranks import HostSums, in_group, is_main, world_size
from kdscale.runtime.signals import StopRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT)  # where ranks got different ones, the first counts


class StopAsked(Exception):  # noqa: N818 - says what happened; it never leaves the trainer
    """Some rank got a signal: all ranks raise this at the same place."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(f"signal {signum}")


class Agreement:
    """One session's; `look` and `settle` are collective calls that every rank makes in the same order.

    `minutes`: how long rank 0's clock lets pass between two checkpoints; None: no clock is read. `written`: whether
    this rank has its part of a checkpoint on the disk; where all have, all call `seal`.
    """

    def __init__(
        self,
        sums: HostSums,
        stop: StopRequest,
        minutes: float | None = None,
        written: Callable[[], bool] = lambda: False,
        seal: Callable[[], None] = lambda: None,
    ):
        self._sums, self._stop, self._written, self._seal = sums, stop, written, seal
        self._seconds = None if minutes is None else 60.0 * minutes
        self._saved_at = time.monotonic()
        self._pending: Callable[[], list[float]] | None = None

    def saved(self) -> None:
        """A checkpoint was just saved: the minutes begin anew."""
        self._saved_at = time.monotonic()

    def look(self) -> None:
        """Before a micro-batch. Raises StopAsked on what was known before the one before it (alone: what is now)."""
        if not in_group():
            self.settle()
            return
        before, self._pending = self._pending, None
        if before is not None:
            self._act_on(before())
        self._pending = self._start()

    def settle(self) -> bool:
        """Between two steps: whether a checkpoint is due by the clock. Raises StopAsked on what is known now."""
        before, self._pending = self._pending, None
        if before is not None:
            before()  # what it found is in the next sum too
        return self._act_on(self._start()())

    def _start(self) -> Callable[[], list[float]]:
        due = is_main() and self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
        asked = [float(self._stop.signum == signum) for signum in _SIGNALS]
        return self._sums.start([float(due), float(self._written()), *asked])

    def _act_on(self, sums: list[float]) -> bool:
        """Raise StopAsked, or seal; returns whether a checkpoint is due."""
        due, written, *asked = sums
        for signum, ranks in zip(_SIGNALS, asked, strict=True):
            if ranks:
                raise StopAsked(signum)
        if written == world_size():
            self._seal()
        return due > 0
