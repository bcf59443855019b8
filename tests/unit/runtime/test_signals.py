"""One signal that arrives twice: at once, and later."""

from __future__ import annotations

import signal

import pytest

from kdscale.errors import Interrupted
from kdscale.runtime.exits import exit_code_of
from kdscale.runtime.signals import signals_as_exceptions, watch_signals


def test_the_same_signal_at_once_again_is_still_one_and_a_later_one_loses_what_is_not_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 60.0)
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with watch_signals() as request:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (request.signum, calls) == (signal.SIGTERM, [])
            monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 0.0)
            with pytest.raises(Interrupted, match="before everything was saved") as caught:
                signal.raise_signal(signal.SIGTERM)
            assert exit_code_of(caught.value) == 128 + signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)  # from then on as before the block
            assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_way_out_is_not_disturbed_by_the_same_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdscale.runtime.signals._SAME_SIGNAL_SECONDS", 60.0)
    left = []
    with signals_as_exceptions():
        try:
            with pytest.raises(Interrupted):
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # from the launcher above, too
            left.append("in order")
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert left == ["in order"]
