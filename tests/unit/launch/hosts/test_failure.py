"""Which of several failures is the cause."""

from __future__ import annotations

from kdscale_launch import Host
from kdscale_launch.hosts.failure import Failure, Outcome, last_error


def test_the_earliest_cause_is_first():
    def failed(rank: int, when: float, said: str, code: int = 1) -> Failure:
        return Failure(0, rank, "", said, when, code)

    closed = "Traceback (most recent call last):\n  x\nRuntimeError: Connection closed by peer"
    outcome = Outcome([Host("a", 4)], failures=[failed(0, 1.0, closed), failed(1, 2.0, "", -9), failed(2, 1.5, "oops")])
    assert outcome.first().rank == 2
    assert failed(1, 0.0, closed, code=-9).is_effect is False  # whoever was killed is a cause, whatever it said before
    assert last_error("noise\nTraceback (most recent call last):\n  f\nA: 1\n").startswith("Traceback")
    assert len(last_error("x\n" * 500).splitlines()) == 40
