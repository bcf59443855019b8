"""Token buckets: how often a client may do something."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_CLIENTS = 20_000  # that are remembered; whoever asked least recently is forgotten first


class Buckets:
    """A bucket for each client: `burst` requests at once, and then `per_minute`. May be used by several threads.

    `clock` gives seconds.
    """

    def __init__(self, per_minute: float, burst: float | None = None, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst, self._clock = per_minute / 60.0, burst or max(1.0, per_minute / 6.0), clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was
        self._lock = threading.Lock()

    def take(self, client: str) -> int:
        """0 when the client may go on; otherwise the whole seconds that it has to wait."""
        return self._wait(client, 1.0)

    def wait(self, client: str) -> int:
        """What `take` would answer, without taking anything."""
        return self._wait(client, 0.0)

    def _wait(self, client: str, taken: float) -> int:
        with self._lock:
            now = self._clock()
            level, then = self._levels.get(client, (self._burst, now))
            level = min(self._burst, level + (now - then) * self._rate)
            if level < 1.0:
                return max(1, math.ceil((1.0 - level) / self._rate))
            if taken:
                self._levels[client] = (level - taken, now)
                self._levels.move_to_end(client)
                while len(self._levels) > _MOST_CLIENTS:
                    self._levels.popitem(last=False)
            return 0
