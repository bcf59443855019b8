"""Timed collectives: what is counted, and that torch gets its functions back."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from kdscale.distill.telemetry import collectives
from kdscale.distill.telemetry.collectives import CollectiveTimer

CPU = torch.device("cpu")


def test_nested_collectives_count_once_and_a_wait_counts(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(collectives, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = CollectiveTimer(CPU)
    handle = SimpleNamespace(wait=lambda: "over", done=True)
    inner = timer.timed(lambda: handle)
    under_way = timer.timed(inner)()
    assert under_way.done
    assert under_way.wait() == "over"
    assert timer.seconds() == 1.0 + 3.0
    assert timer.seconds() == 0.0


def test_functions_are_put_back():
    before = torch.distributed.all_reduce
    with CollectiveTimer(CPU).installed():
        assert torch.distributed.all_reduce is not before
    assert torch.distributed.all_reduce is before
