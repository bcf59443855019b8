"""How long a rank may make no progress, and how long a collective operation may wait."""

from __future__ import annotations

from datetime import timedelta

from kdscale.config.root import Config
from kdscale.runtime.device import resolve_device
from kdscale_launch.watchdog import SLOW_FACTOR

# A micro-batch of a real model takes seconds on a GPU and may take many minutes on a CPU.
_DEFAULT_SECONDS = {"cuda": 300.0, "cpu": 1800.0}
_MARGIN_SECONDS = 60.0


def watchdog_seconds(cfg: Config) -> float:
    """`distill.watchdog_seconds`, or the device's default; 0 means no watchdog."""
    settings = cfg.distill
    if settings.watchdog_seconds is not None:
        return settings.watchdog_seconds
    usual = _DEFAULT_SECONDS.get(resolve_device(cfg.runtime.device).type, 300.0)
    # a teacher on other machines has a limit of its own, whose error says more
    return usual if settings.source_timeout is None else max(usual, settings.source_timeout + _MARGIN_SECONDS)


def group_timeout(cfg: Config) -> timedelta | None:
    """How long a collective may wait: longer than any watchdog, whose message says more. None: torch's default."""
    seconds = watchdog_seconds(cfg)
    return timedelta(seconds=SLOW_FACTOR * seconds + _MARGIN_SECONDS) if seconds else None
