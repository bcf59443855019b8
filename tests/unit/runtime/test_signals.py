"""One signal that arrives twice."""

from __future__ import annotations

import signal

import pytest

from kdscale.runtime.signals import watch_signals


def test_the_same_signal_at_once_again_is_still_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 60.0)
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with watch_signals() as request:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (request.signum, calls) == (signal.SIGTERM, [])
            monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 0.0)
            signal.raise_signal(signal.SIGTERM)  # later: now it does what it did before
            assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
