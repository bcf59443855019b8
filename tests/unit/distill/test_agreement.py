"""When a checkpoint is due by the clock, and when a signal is known."""

from __future__ import annotations

import signal

import pytest

from kdscale.distill import agreement
from kdscale.distill.agreement import Agreement, StopAsked
from kdscale.runtime.ranks import HostSums
from kdscale.runtime.signals import StopRequest


def test_the_minutes_begin_with_the_last_checkpoint_on_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(agreement.time, "monotonic", lambda: now[0])
    ranks = Agreement(HostSums(), StopRequest(), minutes=15)
    now[0] += 15 * 60 - 1
    assert not ranks.settle()
    now[0] += 1
    assert ranks.settle()
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "is_main", lambda: False)
        assert not ranks.settle()
    ranks.saved()
    assert not ranks.settle()
    assert not Agreement(HostSums(), StopRequest()).settle()


class Recorded(HostSums):
    """Sums of two ranks, of which the other one was told to stop before sum number `told`."""

    def __init__(self, told: int) -> None:
        super().__init__()
        self.started, self._told = 0, told

    def start(self, values):  # type: ignore[no-untyped-def]
        self.started += 1
        other = float(self.started > self._told)
        return lambda: [values[0] + other, *values[1:]]


def test_what_one_rank_is_told_all_know_one_micro_batch_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "in_group", lambda: True)
    ranks = Agreement(sums := Recorded(told=2), StopRequest())
    for _ in range(3):
        ranks.look()
    with pytest.raises(StopAsked) as caught:
        ranks.look()
    assert (caught.value.signum, sums.started) == (signal.SIGTERM, 3)


def test_between_two_steps_all_know_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "in_group", lambda: True)
    ranks = Agreement(Recorded(told=1), StopRequest())
    ranks.look()
    with pytest.raises(StopAsked):
        ranks.settle()
