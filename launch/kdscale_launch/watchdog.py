"""A watchdog: a rank that makes no progress reports where it hangs and leaves with an exit code of its own.

There are two clocks, neither of them in the training loop. A Python thread counts the time since the last sign of
progress; past the limit it writes every thread's stack and one line that the launcher reads, and ends the process,
wherever the main thread is. A C extension that keeps Python's lock would stop that thread too: each of its rounds
therefore re-arms faulthandler's C timer, which then writes the stacks and leaves with 1. Standard library only.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from kdscale_launch.job import HUNG_EXIT_CODE

MARK = "kdscale watchdog:"
WAITING = "waiting for other ranks"
# Loading, saving and exporting have no steps to count, and take as long as the storage does.
SLOW_PHASES = frozenset({"start", "load", "initialise", "checkpoint", "export"})
SLOW_FACTOR = 4
_REPORT_SECONDS = 10.0  # a log on storage that hangs must not keep the rank alive
_ROUND_SECONDS = 1.0
# where ranks wait for each other; the wait for a collective under way is C code that the last of these calls
_COLLECTIVE = re.compile(r"torch/distributed/|deepspeed/(comm|runtime/zero)/|kdscale/runtime/ranks\.py$")
_SHOWN_FOLDERS = 3


class Watchdog:
    """Ends the process after `seconds` without progress; after SLOW_FACTOR times as many in SLOW_PHASES."""

    def __init__(self, seconds: float, rank: int):
        self._seconds, self._rank = seconds, rank
        self._phase = "start"
        self._step: int | None = None  # None in the stages before the distillation
        self._describe: Callable[[], str] = str
        self.beats = 0
        self._stopped = threading.Event()
        self._out = os.dup(2)  # this rank's log, whatever is redirected later
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str) -> None:
        """See the function `enter`."""
        self._phase = phase
        self.beats += 1

    def beat(self) -> None:
        """See the function `beat`."""
        self.beats += 1

    def at_step(self, step: int, describe: Callable[[], str]) -> None:
        """See the function `at_step`."""
        self._step, self._describe = step, describe
        self.beats += 1

    def start(self) -> None:
        """Start watching; the time counts from now."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; returns when the thread has ended."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        os.close(self._out)

    @property
    def _limit(self) -> float:
        return self._seconds * (SLOW_FACTOR if self._phase in SLOW_PHASES else 1)

    def _watch(self) -> None:
        pause = min(_ROUND_SECONDS, self._seconds / 8)
        last_beats, idle, before = -1, 0.0, time.monotonic()
        while True:
            faulthandler.dump_traceback_later(self._limit + 2 * pause, exit=True, file=self._out)
            if self._stopped.wait(pause):
                return
            now = time.monotonic()
            # the time during which the process was stopped by a signal does not count
            idle, before = idle + min(now - before, 2 * pause), now
            if self.beats != last_beats:
                last_beats, idle = self.beats, 0.0
            if idle > self._limit:
                self._leave(idle)

    def _leave(self, idle: float) -> None:
        reporter = threading.Thread(target=self._report, args=(idle,), daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)
        os._exit(HUNG_EXIT_CODE)

    def _report(self, idle: float) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        faulthandler.dump_traceback(file=self._out, all_threads=True)
        os.write(self._out, f"{MARK} rank {self._rank} {self._sentence(frame, idle)}\n".encode())

    def _sentence(self, frame: FrameType | None, idle: float) -> str:
        where = f"{frame.f_code.co_name} ({_short(frame)})" if frame else "a main thread that has ended"
        waits = f"; {WAITING}" if frame and _in_collective(frame) else ""
        details = self._describe()
        step = f", step {self._step}{f', {details}' if details else ''}" if self._step is not None else ""
        return f"hung in {where}: phase {self._phase}{step}, no progress for {idle:.0f} s{waits}"


def _short(frame: FrameType) -> str:
    return "/".join([*frame.f_code.co_filename.split("/")[-_SHOWN_FOLDERS:]]) + f":{frame.f_lineno}"


def _in_collective(frame: FrameType) -> bool:
    """Whether the innermost Python function belongs to a collective: then it is another rank that hangs."""
    return _COLLECTIVE.search(frame.f_code.co_filename) is not None


_current: list[Watchdog] = []


def enter(phase: str) -> None:
    """Report progress: this process is now in `phase`. Does nothing where no watchdog runs."""
    for watchdog in _current:
        watchdog.enter(phase)


def beat() -> None:
    """Report progress within the phase: another block, layer or document. Cheap enough to call for each one."""
    for watchdog in _current:
        watchdog.beat()


def progress() -> int:
    """A number that grows whenever this process reports progress; 0 where no watchdog runs."""
    return sum(watchdog.beats for watchdog in _current)


def at_step(step: int, describe: Callable[[], str]) -> None:
    """Report progress: optimiser step `step` begins. `describe()` names its data; it is called only when it hangs."""
    for watchdog in _current:
        watchdog.at_step(step, describe)


@contextmanager
def watching(seconds: float, rank: int) -> Iterator[None]:
    """Watch this process within the block; with 0 seconds, only print stacks on SIGUSR1. Blocks must not be nested."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # by which a launcher asks for the stacks
    watchdogs = [Watchdog(seconds, rank)] if seconds else []
    for watchdog in watchdogs:
        watchdog.start()
    _current.extend(watchdogs)
    try:
        yield
    finally:
        _current.clear()
        for watchdog in watchdogs:
            watchdog.stop()
        faulthandler.unregister(signal.SIGUSR1)
