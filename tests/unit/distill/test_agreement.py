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
    """Sums of two ranks, of which the other one was told to stop, or had written, before sum number `since`."""

    def __init__(self, since: int, position: int = 2) -> None:
        super().__init__()
        self.started, self._since, self._position = 0, since, position

    def start(self, values):  # type: ignore[no-untyped-def]
        self.started += 1
        other = float(self.started > self._since)
        return lambda: [value + other * (index == self._position) for index, value in enumerate(values)]


def test_what_one_rank_is_told_all_know_one_micro_batch_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "in_group", lambda: True)
    ranks = Agreement(sums := Recorded(since=2), StopRequest())
    for _ in range(3):
        ranks.look()
    with pytest.raises(StopAsked) as caught:
        ranks.look()
    assert (caught.value.signum, sums.started) == (signal.SIGTERM, 3)


def test_between_two_steps_all_know_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "in_group", lambda: True)
    ranks = Agreement(Recorded(since=1), StopRequest())
    ranks.look()
    with pytest.raises(StopAsked):
        ranks.settle()


def test_a_checkpoint_is_sealed_between_micro_batches_when_all_have_written_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "in_group", lambda: True)
    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    sealed: list[int] = []
    sums = Recorded(since=2, position=1)
    ranks = Agreement(
        sums, StopRequest(), written=lambda: not sealed, seal=lambda: sealed.append(sums.started)
    )  # this rank has
    for _ in range(5):
        ranks.look()
    assert sealed == [3]
